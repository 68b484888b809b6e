"""moe-bsr results: the page is the one in the repository."""

import shutil
from pathlib import Path

import pytest

from moe_bsr.cli.main import main

RESULTS = Path(__file__).parents[2] / "results"

pytest.importorskip("moe_bsr.runs.results")


def test_the_page_is_what_it_writes(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "results")
    (tmp_path / "results" / "README.md").unlink()
    assert main(["results", str(tmp_path / "results")]) == 0
    written = (tmp_path / "results" / "README.md").read_text()
    assert written == (RESULTS / "README.md").read_text(), "stale: moe-bsr results writes it anew"
