"""The public API: custom callbacks, the values they add to the report, and the evaluation of a run."""

import json

import pytest
from tiny_runs import LATE, TASKS, make_config

import moe_bsr
from moe_bsr import api
from moe_bsr.callbacks import default_callbacks
from moe_bsr.model import multitask
from moe_bsr.model.multitask import build_on_meta
from moe_bsr.training.callback import Callback

pytestmark = pytest.mark.usefixtures("light")


class Recorder(Callback):
    """Records its events, and adds values to the report."""

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


def test_custom_callbacks_are_called_and_metrics_are_still_written(tmp_path, capsys):
    recorder = Recorder("mine", answer=42, status="overwritten?")
    report = moe_bsr.train(make_config(tmp_path, **LATE, train__steps=2), tmp_path / "run", callbacks=[recorder])
    assert recorder.events == ["start", "step", "step", "val", "test", "end", "close"]
    assert report["answer"] == 42 and report["status"] == "finished"  # the trainer's own values stay
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2 + 2 * len(TASKS)
    assert not (tmp_path / "run" / "tensorboard").exists() and capsys.readouterr().out == ""


def test_values_added_by_callbacks_do_not_depend_on_their_order(tmp_path):
    for number, order in enumerate(([0, 1], [1, 0])):
        callbacks = [Recorder("a"), Recorder("b")]
        config = make_config(tmp_path, **LATE, train__steps=1, train__evaluate_test=False)
        report = moe_bsr.train(config, tmp_path / str(number), callbacks=[callbacks[i] for i in order])
        assert report["a saw"] == report["b saw"]
        assert "a saw" not in report["b saw"] and "mean_top1" in report["a saw"]


def test_callbacks_run_once_per_task_in_single_task_mode(tmp_path):
    recorder = Recorder("mine")
    config = make_config(tmp_path, **LATE, mode="single_task", train__steps=1, train__evaluate_test=False)
    moe_bsr.train(config, tmp_path / "run", callbacks=[recorder])
    assert recorder.folders == list(TASKS) and recorder.events.count("close") == 2


def test_a_run_checks_its_model_once_and_before_weights_are_read(tmp_path, monkeypatch):
    built = []
    for module in (api, multitask):
        monkeypatch.setattr(module, "build_on_meta", lambda *given: built.append("meta") or build_on_meta(*given))
    monkeypatch.setattr(multitask, "digest", lambda state: built.append("weights") or "")
    moe_bsr.train(make_config(tmp_path, **LATE, train__steps=1), tmp_path / "run", callbacks=[])
    assert built == ["meta", "weights"]


def test_default_callbacks_have_distinct_names(tmp_path):
    names = [callback.name for callback in default_callbacks(tmp_path)]
    assert names == ["console", "jsonl", "tensorboard", "expert_views", "mistakes"]


@pytest.mark.parametrize("mode", ["multitask", "single_task"])
def test_evaluate_agrees_with_the_trainers_evaluation(tmp_path, mode):
    report = moe_bsr.train(make_config(tmp_path, **LATE, mode=mode, train__steps=2), tmp_path / "run", callbacks=[])
    events = []
    result = moe_bsr.evaluate(tmp_path / "run", "test", on_task=lambda *event: events.append(event))
    assert result["mean_top1"] == pytest.approx(report["mean_top1"]) and result["test_evaluations"] == 2
    assert events == [("shapes", 10), ("fractals", 12)] and list(result["tasks"]) == list(TASKS)
    loaded = moe_bsr.load(tmp_path / "run")
    one = moe_bsr.evaluate(loaded, tasks=["fractals"])
    assert list(one["tasks"]) == ["fractals"] and "test_evaluations" not in one
    for tasks, order in (([], list(TASKS)), (["fractals", "shapes"], ["fractals", "shapes"])):
        for run in (loaded, tmp_path / "run"):
            assert list(moe_bsr.evaluate(run, tasks=tasks)["tasks"]) == order
    with pytest.raises(ValueError, match="no task 'nothing': this run has shapes, fractals"):
        moe_bsr.evaluate(loaded, tasks=["nothing"])
    with pytest.raises(ValueError, match="split: 'train'"):
        moe_bsr.evaluate(loaded, "train")


def test_what_is_imported_late_is_listed():
    assert set(moe_bsr.__all__) <= set(dir(moe_bsr))
