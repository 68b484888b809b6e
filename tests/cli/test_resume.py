"""Test a run folder as the configuration of a command: resume it, train it longer, train it again elsewhere."""

import os
import signal

import pytest
import yaml
from tiny_data import folder_task
from tiny_runs import LATE, act_at, make_config

from moe_bsr import config as configuration
from moe_bsr.api import train
from moe_bsr.cli.main import main
from moe_bsr.config import load
from moe_bsr.runs import report
from moe_bsr.selftest import kills

pytestmark = pytest.mark.usefixtures("bare")


def test_a_run_is_resumed_and_extended_by_its_folder_alone(tmp_path, monkeypatch, capsys):
    file, run = tmp_path / "tiny.yaml", tmp_path / "my run"
    file.write_text(configuration.dump(make_config(tmp_path, **LATE)))
    changes = ["train.lr=0.02", "train.steps=3", "train.evaluate_test=false"]
    with monkeypatch.context() as patch:
        act_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["train", str(file), *changes, "--run", str(run)]) == 128 + signal.SIGTERM
    assert f"Go on with: moe-bsr train '{run}' --resume" in capsys.readouterr().out
    assert main(["train", str(run)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", str(run), "--resume"]) == 0
    assert main(["train", str(file), *changes, "--run", str(tmp_path / "whole")]) == 0
    assert not kills.differing(run, kills.outcome(tmp_path / "whole"))
    assert main(["train", str(run), "--resume", "train.steps=4"]) == 0
    assert report.read(run)["step"] == 4


def test_a_run_is_resumed_from_another_directory(tmp_path, monkeypatch):
    """The task files and the data are named relative to the directory where the run started."""
    folder_task(tmp_path, each=4)
    config = configuration.replace(
        make_config(tmp_path, **LATE), tasks=["pictures.yaml"], data__root=".", train__steps=1
    )
    monkeypatch.chdir(tmp_path)
    train(config, "run", callbacks=[])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", str(tmp_path / "run"), "--resume", "train.steps=2"]) == 0
    assert report.read(tmp_path / "run")["step"] == 2


def test_a_run_folder_serves_as_a_configuration(tiny_run, tmp_path, capsys):
    """The run can be named by its folder or by its configuration file."""
    again = tmp_path / "again"
    assert main(["train", str(tiny_run / "config.yaml"), "--run", str(again)]) == 0
    assert not kills.differing(again, kills.outcome(tiny_run))
    assert load(tiny_run) == load(tiny_run / "config.yaml")
    assert main(["cost", str(tiny_run)]) == 0


def test_the_resolved_section_of_a_configuration_is_not_parsed(tmp_path):
    """The file is larger than a configuration may be, because its `resolved` section holds 100,000 class names."""
    tree = {"seed": 5, "train": {"steps": 3}}
    text = yaml.safe_dump(tree, sort_keys=False) + "resolved:\n  classes:\n" + 100_000 * f"  - {'x' * 20}\n"
    (tmp_path / "config.yaml").write_text(text)
    config = load(tmp_path, ["seed=6"])
    assert (config.seed, config.train.steps) == (6, 3)


def test_a_dry_run_lists_the_weights_taken_from_another_run(tiny_run, tmp_path, capsys):
    call = [str(tiny_run), f"train.init_from={tiny_run}", "plan.moe_blocks=[]", "--run", str(tmp_path / "next")]
    assert main(["train", *call, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "taken: blocks 1, 3, 5, norm, head of shapes (10 of 10 classes)" in printed
    assert "left: experts of blocks 3, 5" in printed and not (tmp_path / "next").exists()
