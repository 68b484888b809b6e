"""Test moe-bsr reproduce: figures as JSON, the page in docs/, and the failure on a figure that is off."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moe_bsr.cli.main import main
from moe_bsr.paper import tables

PAGE = Path(__file__).parents[2] / "docs/paper_tables.md"


def test_json_has_every_figure(capsys):
    assert main(["reproduce", "--json", "3"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert {"table", "row", "column", "published", "ours", "rule", "relative_difference", "note"} <= set(first)
    assert (first["table"], first["row"], first["published"]) == ("3", "FT-Full", 8649.0)
    assert first["relative_difference"] == pytest.approx(first["ours"] / 8649 - 1)
    assert first["kept_mb"]["autograd, plain PyTorch"] == pytest.approx(67.25, abs=0.01)


def test_a_figure_that_is_off_fails(monkeypatch, capsys):
    moved = [replace(f, published="8700") if f.published == "8649" else f for f in tables.FIGURES if f.table == "2"]
    monkeypatch.setattr(tables, "FIGURES", moved)
    assert main(["reproduce", "2"]) == 1
    assert "OFF" in capsys.readouterr().out


def test_an_unknown_table_is_refused(capsys):
    assert main(["reproduce", "9"]) == 2
    assert "no table '9'; there are 1, 2" in capsys.readouterr().err


def test_the_page_in_docs_is_up_to_date(capsys):
    assert main(["reproduce", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(), "stale: moe-bsr reproduce --markdown makes it anew"
