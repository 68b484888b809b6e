"""A few cases of each campaign of `moe-bsr selftest`. Long campaigns are run by hand."""

import json
import os
import random

import pytest
from fresh import in_fresh_process

from moe_bsr.cli.main import main
from moe_bsr.selftest import damage, hostile, injuries, kills


def test_runs_survive_kills_at_random_and_during_a_checkpoint_write(tmp_path):
    # Operations 61 to 76 of the run are one checkpoint write, with the removal of an old one.
    result = in_fresh_process(tmp_path, "kills.campaign(folder, 1, 0, main, stages=[70])")
    assert (result["tried"], result["kills"], result["stages"]) == (2, 1, 1)
    assert result["failures"] == []


def test_different_results_after_a_kill_are_reported(tmp_path):
    (tmp_path / "checkpoint/9").mkdir(parents=True)
    for name in ("checkpoint/9/weights.safetensors", "metrics.jsonl"):
        (tmp_path / name).write_bytes(b"a")
    expected = kills.outcome(tmp_path)
    assert kills.differing(tmp_path, expected) == []
    (tmp_path / "metrics.jsonl").write_bytes(b"b")
    (tmp_path / "checkpoint/9/average.safetensors").write_bytes(b"a")
    assert kills.differing(tmp_path, expected) == ["average.safetensors", "metrics.jsonl"]


def test_damaged_runs_are_handled(tmp_path):
    result = in_fresh_process(tmp_path, "damage.campaign(folder, 2, 1, main)")
    assert result["tried"] == 2 == sum(kind["tried"] for kind in result["kinds"].values())
    assert result["failures"] == []


@pytest.mark.parametrize("what", ["device", "FIFO", "nothing"])
def test_several_injuries_are_not_applied_to_devices_and_fifos(tmp_path, what):
    run, chance = tmp_path / "run", random.Random(0)
    (run / "checkpoint" / "3").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "checkpoint/3/weights.safetensors"):
        (run / name).write_text("x: 1")
    if what == "FIFO":
        os.mkfifo(run / "lock")
    elif what == "device":
        (run / "lock").symlink_to("/dev/zero")
    assert bool(injuries.KINDS["several"](run, tmp_path / "canary", chance)) == (what == "nothing")


def test_hostile_files_are_handled(tmp_path):
    result = in_fresh_process(tmp_path, "hostile.campaign(folder, 4, 1, main)")
    assert result["tried"] == 4 and result["failures"] == []


@pytest.mark.parametrize("wrong", ["reads outside", "crashes", "prints control letters", "writes outside"])
def test_a_faulty_program_fails_the_campaign(tmp_path, wrong):
    def faulty(arguments):
        if wrong == "crashes":
            raise KeyError(wrong)
        if wrong == "writes outside":
            (tmp_path / "canary").write_text("was here")
        if wrong == "prints control letters":
            print("\x1b[31m")
        return {"reads outside": 3}.get(wrong, 0)

    result = hostile.campaign(tmp_path, 1, 0, faulty)
    assert result["failed"] == 1


def test_the_command_prints_json_and_its_exit_status_reports_failures(monkeypatch, capsys):
    for failed in (0, 1):
        found = {"tried": 1, "failed": failed, "failures": ["x"] * failed}
        monkeypatch.setattr(damage, "campaign", lambda *arguments, found=found: dict(found))
        assert main(["selftest", "--damage", "1", "--json"]) == failed
        printed = json.loads(capsys.readouterr().out)
        assert printed["failed"] == failed and printed["damage"]["tried"] == 1 and "kills" not in printed
