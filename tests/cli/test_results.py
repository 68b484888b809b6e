"""Test moe-bsr results: it writes the same page as the one in the repository."""

import shutil
from pathlib import Path

import pytest

from moe_bsr.cli.main import main

RESULTS = Path(__file__).parents[2] / "results"

pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="installed without its results")


def test_the_page_in_results_is_up_to_date(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "results")
    (tmp_path / "results" / "README.md").unlink()
    assert main(["results", str(tmp_path / "results")]) == 0
    written = (tmp_path / "results" / "README.md").read_text()
    assert written == (RESULTS / "README.md").read_text(), "stale: moe-bsr results writes it anew"
