"""The library's front: callbacks handed in, values they add to the report, evaluation of a run."""

import json
import shutil

import pytest
from tiny_runs import TASKS, make_config, make_trainer

import moe_bsr
from moe_bsr.callbacks import default_callbacks
from moe_bsr.config import ConfigError
from moe_bsr.runs import checkpoint
from moe_bsr.runtime import memory
from moe_bsr.training.callback import Callback


class Recorder(Callback):
    """Notes what it is told, and adds to the report."""

    def __init__(self, name: str, **values) -> None:
        self.name, self.values = name, values
        self.events: list[str] = []
        self.folders: list[str] = []

    def on_start(self, start) -> None:
        self.events.append("start")
        self.folders.append(start.folder.name)

    def on_step(self, step) -> None:
        self.events.append("step")

    def on_evaluate(self, evaluation) -> None:
        self.events.append(evaluation.split)

    def on_end(self, report) -> dict:
        self.events.append("end")
        return self.values | {f"{self.name} saw": sorted(report)}

    def close(self) -> None:
        self.events.append("close")


def test_callbacks_are_handed_in_and_metrics_are_written_all_the_same(tmp_path, capsys):
    recorder = Recorder("mine", answer=42, status="overwritten?")
    report = moe_bsr.train(make_config(tmp_path, train__steps=2), tmp_path / "run", callbacks=[recorder])
    assert recorder.events == ["start", "step", "step", "val", "test", "end", "close"]
    assert report["answer"] == 42 and report["status"] == "finished"  # nothing of the trainer's is overwritten
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2 + 2 * len(TASKS)
    assert not (tmp_path / "run" / "tensorboard").exists() and capsys.readouterr().out == ""


def test_what_callbacks_add_does_not_depend_on_their_order(tmp_path):
    for place, order in enumerate(([0, 1], [1, 0])):
        callbacks = [Recorder("a"), Recorder("b")]
        config = make_config(tmp_path, train__steps=1, train__evaluate_test=False)
        report = moe_bsr.train(config, tmp_path / str(place), callbacks=[callbacks[i] for i in order])
        assert report["a saw"] == report["b saw"]
        assert "a saw" not in report["b saw"] and "mean_top1" in report["a saw"]


def test_callbacks_follow_one_task_after_the_other(tmp_path):
    recorder = Recorder("mine")
    config = make_config(tmp_path, mode="single_task", train__steps=1, train__evaluate_test=False)
    moe_bsr.train(config, tmp_path / "run", callbacks=[recorder])
    assert recorder.folders == list(TASKS) and recorder.events.count("close") == 2


def test_the_default_callbacks_have_names_of_their_own(tmp_path):
    names = [callback.name for callback in default_callbacks(tmp_path)]
    assert names == ["console", "jsonl", "tensorboard", "expert_views", "mistakes"]


@pytest.mark.parametrize("mode", ["multitask", "single_task"])
def test_a_run_is_evaluated_as_the_trainer_evaluated_it(tmp_path, mode):
    report = moe_bsr.train(make_config(tmp_path, mode=mode, train__steps=2), tmp_path / "run", callbacks=[])
    told = []
    result = moe_bsr.evaluate(tmp_path / "run", "test", on_task=lambda *event: told.append(event))
    assert result["mean_top1"] == pytest.approx(report["mean_top1"]) and result["test_evaluations"] == 2
    assert told == [("shapes", 10), ("fractals", 12)] and list(result["tasks"]) == list(TASKS)
    loaded = moe_bsr.load(tmp_path / "run")
    one = moe_bsr.evaluate(loaded, tasks=["fractals"])
    assert list(one["tasks"]) == ["fractals"] and "test_evaluations" not in one
    with pytest.raises(ValueError, match="nothing"):
        moe_bsr.evaluate(loaded, tasks=["nothing"])
    with pytest.raises(ValueError, match="split: 'train'"):
        moe_bsr.evaluate(loaded, "train")


# --- memory ---


def test_a_run_that_may_not_fit_is_warned_of_and_one_that_does_is_not(tmp_path, monkeypatch, recwarn):
    config = make_config(tmp_path, train__steps=1, train__evaluate_test=False)
    moe_bsr.train(config, tmp_path / "fits", callbacks=[])
    assert not [each for each in recwarn if "memory" in str(each.message)]
    monkeypatch.setattr(memory, "available", lambda device: (3 * 2**20, "this machine"))
    with pytest.warns(
        UserWarning, match="may run out of memory: .* this machine has 3 MB free; lower train.batch_size"
    ):
        assert moe_bsr.train(config, tmp_path / "tight", callbacks=[])["status"] == "finished"


def test_a_model_whose_parameters_do_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: (2**20, "this machine"))
    with pytest.raises(ConfigError, match="parameters alone take 2 MB, and this machine has 1 MB free; take a smaller"):
        moe_bsr.train(make_config(tmp_path), tmp_path / "run", callbacks=[])
    assert not (tmp_path / "run").exists()


def test_checkpoints_without_room_are_refused_before_the_first_update(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda run: shutil._ntuple_diskusage(0, 0, 2**20))
    with pytest.raises(ConfigError, match="no room for the run's checkpoints: 3 of 3.2 MB each need 9.5 MB, 1.0 MB"):
        moe_bsr.train(make_config(tmp_path), tmp_path / "run", callbacks=[])
    assert not (tmp_path / "run").exists()


def test_the_size_of_a_checkpoint_is_foreseen(tmp_path):
    config = make_config(tmp_path, train__steps=2, train__ema_decay=0.5, train__evaluate_test=False)
    trainer = make_trainer(config, tmp_path / "run")
    foreseen = trainer.state.sizes()
    trainer.fit()
    for name, size in foreseen.items():
        written = (tmp_path / "run" / "checkpoint" / "2" / f"{name}.safetensors").stat().st_size
        assert size == pytest.approx(written, rel=0.03)
