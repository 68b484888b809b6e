"""CSV, Weights & Biases and MLflow: each value is logged once, resumed runs continue, missing packages are errors."""

import csv
import sys
import types

import pytest
from tiny_runs import LATE, Crash, act_at, crash, make_config

import moe_bsr
from moe_bsr.callbacks import Csv, MLflow, WandB, trackers
from moe_bsr.config import ConfigError, replace
from moe_bsr.training.callback import Callback

pytestmark = pytest.mark.usefixtures("bare")


class FakeWandB(types.ModuleType):
    """Replaces the used part of wandb, and records the calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs, self.inits = {}, []

    def init(self, **given):
        self.inits.append(given)
        run = self.runs.setdefault(given.get("id") or f"run{len(self.runs)}", types.SimpleNamespace(
            logged=[], metrics=[], summary={}, ended=0
        ))  # fmt: skip
        run.id = next(key for key, value in self.runs.items() if value is run)
        run.log = run.logged.append
        run.define_metric = lambda *names, **options: run.metrics.append((names, options))
        run.finish = lambda: setattr(run, "ended", run.ended + 1)
        return run


class FakeMLflow(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("mlflow")
        self.logged, self.params, self.ended, self.started = [], {}, [], []

    def active_run(self):
        return None

    def start_run(self, run_id, run_name, nested):
        self.started.append((run_id, run_name, nested))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "abc"))

    def log_params(self, params):
        assert not self.params
        self.params = params

    def log_metrics(self, values, step):
        assert all(type(value) in (int, float) for value in values.values())
        self.logged.append((step, values))

    def end_run(self, status):
        self.ended.append(status)


@pytest.fixture
def fakes(monkeypatch):
    found = {"wandb": FakeWandB(), "mlflow": FakeMLflow()}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(trackers, "find_spec", lambda name: found.get(name))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return types.SimpleNamespace(**found)


def test_a_resumed_run_continues_the_same_run_in_every_logger(tmp_path, fakes, monkeypatch):
    config = make_config(
        tmp_path, **LATE, train__steps=4, train__checkpoint_every=1, train__log_to=["csv", "wandb", "mlflow"]
    )
    run = tmp_path / "mine"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        act_at(patch, 3, crash)
        moe_bsr.train(config, run, callbacks=[])
    assert fakes.mlflow.ended == ["FAILED"] and fakes.wandb.runs["run0"].ended == 1
    report = moe_bsr.train(replace(config, train__log_to=["wandb", "mlflow", "csv"]), run, resume=True, callbacks=[])

    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [(row["step"], row["split"]) for row in rows] == [
        *((str(step), "train") for step in range(1, 5)), *[("4", "val")] * 2, *[("4", "test")] * 2
    ]  # fmt: skip
    assert float(rows[-1]["top1"]) == report["tasks"]["fractals"]["top1"] and rows[-1]["lr"] == ""
    assert float(rows[0]["loss"]) > 0 and rows[0]["top1"] == "" and rows[0]["images"] == "8"

    (log,) = fakes.wandb.runs.values()
    first, second = fakes.wandb.inits
    assert (first["project"], first["name"], first["config"]["train"]["steps"]) == ("moe_bsr", "mine", 4)
    assert (second["id"], second["resume"]) == ("run0", "allow") and log.ended == 2
    steps = [entry["update"] for entry in log.logged if any(key.startswith("train/") for key in entry)]
    assert steps == [1, 2, 3, 4]  # the third was logged only once, before or after the crash in another callback
    top1 = [entry["val/mean/top1"] for entry in log.logged if "val/mean/top1" in entry]
    assert top1 == [report["selected_mean_val_top1"]]
    assert log.summary["result/mean_top1"] == report["mean_top1"]

    assert fakes.mlflow.started == [(None, "mine", False), ("abc", "mine", False)]
    assert fakes.mlflow.params["train.steps"] == "4" and fakes.mlflow.ended == ["FAILED", "FINISHED"]
    losses = {
        step: values["train/shapes/loss"] for step, values in fakes.mlflow.logged if "train/shapes/loss" in values
    }
    assert losses == {int(row["step"]): float(row["loss"]) for row in rows if row["task"] == "shapes" and row["lr"]}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_an_error_before_training(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=f"{name} is not installed: pip install {name}"):
        moe_bsr.train(make_config(tmp_path, train__log_to=[name]), tmp_path / "run")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.jsonl"))
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        {"wandb": WandB, "mlflow": MLflow}[name]()


def test_a_failing_tracker_causes_only_a_warning(tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(fakes.wandb, "init", lambda **given: 1 / 0)
    config = make_config(tmp_path, **LATE, train__steps=1, train__evaluate_test=False)
    seen = []
    watcher = type("Watcher", (Callback,), {"on_step": lambda self, step: seen.append(step.step)})()
    with pytest.warns(UserWarning, match="callback 'wandb' failed in on_start: ZeroDivisionError"):
        report = moe_bsr.train(config, tmp_path / "run", callbacks=[WandB("flowers"), watcher, Csv(tmp_path / "run")])
    assert report["status"] == "finished" and seen == [1]


def test_log_to_accepts_one_name_and_rejects_unknown_ones(tmp_path):
    assert make_config(tmp_path, train__log_to="csv").train.log_to == ["csv"]
    with pytest.raises(ConfigError, match=r"train\.log_to.*one of csv, wandb, mlflow; did you mean 'wandb'"):
        make_config(tmp_path, train__log_to=["wand"])
