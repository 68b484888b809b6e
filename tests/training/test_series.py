"""One model per task: a series of complete runs that stops and resumes as one."""

import json
import os
import signal

import pytest
from tiny_runs import LATE, TASKS, Crash, act_at, crash, make_config

import moe_bsr
from moe_bsr.api import train
from moe_bsr.config import Config, ConfigError, replace
from moe_bsr.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture
def config(tmp_path) -> Config:
    return make_config(tmp_path, **LATE, mode="single_task", train__steps=3, train__task_weights={"shapes": 2.0})


def test_each_run_of_a_series_is_complete_and_the_report_combines_them(config, tmp_path):
    folder = tmp_path / "run"
    report = train(config, folder)
    assert report == json.loads((folder / "report.json").read_text())
    assert (folder / "report.md").is_file()
    parts = {name: json.loads((folder / name / "report.json").read_text()) for name in TASKS}
    for name, part in parts.items():
        assert list(part["tasks"]) == [name] and part["tasks"][name]["updates"] == 3
        assert moe_bsr.load(folder / name).config.mode == "multitask"
    assert report["tasks"] == {name: part["tasks"][name] for name, part in parts.items()}
    assert report["status"] == "finished" and report["test_evaluations"] == 1
    assert report["mean_top1"] == sum(task["top1"] for task in report["tasks"].values()) / 2
    assert report["train_seconds"] == sum(part["train_seconds"] for part in parts.values())
    assert report["measured_peak_mb"] == max(part["measured_peak_mb"] for part in parts.values())
    assert {"predicted_peak_mb", "gflops_per_image", "split", "weights"} <= report.keys()
    loaded = moe_bsr.load(folder)
    assert loaded.models["shapes"] is not loaded.models["fractals"]
    assert list(loaded.models["fractals"].heads) == ["fractals"]
    assert {task: len(names) for task, names in loaded.class_names.items()} == {"shapes": 10, "fractals": 12}


def test_a_series_does_not_overwrite_its_first_run(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        act_at(patch, 3, crash)
        train(replace(config, train__checkpoint_every=1), tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already"):
        train(replace(config, train__steps=9), tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_run_of_a_series_does_not_depend_on_the_other_tasks(config, tmp_path):
    train(config, tmp_path / "both")
    train(replace(config, mode="multitask", tasks=config.tasks[1:], train__task_weights={}), tmp_path / "alone")
    for file in ("metrics.jsonl", "checkpoint/3/weights.safetensors"):
        both, alone = tmp_path / "both" / "fractals" / file, tmp_path / "alone" / file
        assert both.read_bytes() == alone.read_bytes()


def test_an_interrupted_task_stops_the_series_and_a_resume_skips_finished_ones(config, tmp_path, monkeypatch):
    started, fit = [], Trainer.fit

    def interrupted(self, resume):
        started.append(list(self.tasks))
        if started[-1] == ["fractals"] and len(started) == 2:
            act_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return fit(self, resume)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", interrupted)
        assert train(config, tmp_path / "run")["status"] == "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", interrupted)
        report = train(config, tmp_path / "run", resume=True)
    assert started == [["shapes"], ["fractals"], ["fractals"]]
    assert report["status"] == "finished" and list(report["tasks"]) == list(TASKS)


def test_a_series_killed_between_two_tasks_is_not_finished(config, tmp_path, monkeypatch):
    fit = Trainer.fit
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "fit", lambda self, resume: crash() if "fractals" in self.tasks else fit(self, resume))
        train(config, tmp_path / "run")
    report = train(config, tmp_path / "run", resume=True)
    assert list(report["tasks"]) == list(TASKS) and report["status"] == "finished"
