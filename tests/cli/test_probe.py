"""Test moe-bsr probe, which trains the linear probe of a configuration."""

import json

import pytest
from tiny_runs import make_config

from moe_bsr import config as configuration
from moe_bsr.cli.main import main

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(configuration.dump(make_config(tmp_path)))
    return path


def test_probe_writes_a_finished_run_that_compare_reads(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["probe", str(file), "--blocks", "2", "4"]) == 0
    assert "Weights selected: those of step 1 of 1" in capsys.readouterr().out
    folder = tmp_path / "runs" / "mine_probe"
    report = json.loads((folder / "report.json").read_text())
    assert report["config"]["plan"]["drop_blocks"] == [1, 3] and report["config"]["plan"]["train_blocks"] == []
    assert report["config"]["plan"]["head_blocks"] == [2, 4]
    assert main(["compare", str(folder)]) == 0
    assert "mine_probe" in capsys.readouterr().out
    assert main(["probe", str(file), "--blocks", "2", "4", "--resume"]) == 0
    assert json.loads((folder / "report.json").read_text()) == report


def test_a_dry_run_writes_nothing(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["probe", str(file), "plan.drop_blocks=[]", "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists()
