"""Log a run's numbers, configuration and report to Weights & Biases or MLflow.

Both packages are optional. A run that asks for a missing one is refused before it begins. Later errors in them become
warnings and do not stop training. A resumed run continues the same W&B or MLflow run.
"""

import math
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from moe_bsr import config as configuration
from moe_bsr.callbacks import numbers
from moe_bsr.config import ConfigError
from moe_bsr.training.callback import Callback, EvalEvent, StartEvent, StepEvent

MAX_POINTS = 2000  # training points per task and number


def require(package: str) -> None:
    """Check that a package is installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec(package) is None:
        raise ConfigError(f"train.log_to: {package} is not installed: pip install {package}, or leave it out")


class Tracker(Callback):
    """Base class of both: selects the numbers and how often they are logged, and saves the run's id for resuming."""

    def __init__(self, package: str) -> None:
        require(package)
        self.api = import_module(package)
        self.run_id: str | None = None

    def state(self) -> dict[str, Any]:
        return {"run_id": self.run_id} if self.run_id else {}

    def restore(self, state: dict[str, Any]) -> None:
        self.run_id = state.get("run_id")

    def on_start(self, start: StartEvent) -> None:
        self.every = math.ceil(start.config.train.steps / MAX_POINTS)
        self.begin(start.folder.name or "run", start.folder, configuration.to_dict(start.config))

    def on_step(self, step: StepEvent) -> None:
        if step.progress[step.task]["updates"] % self.every == 0:
            self.log(numbers.of_step(step), step.step)

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        self.log(numbers.of_evaluation(evaluation), evaluation.step)

    def begin(self, name: str, folder: os.PathLike, config: dict[str, Any]) -> None:
        """Open a new run, or the run `run_id` if it is set."""
        raise NotImplementedError

    def log(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError


class WandB(Tracker):
    """Logs to Weights & Biases. The arguments go to `wandb.init`, in addition to the run's name and configuration.

        moe_bsr.train(config, "runs/mine", callbacks=[WandB(project="flowers", tags=["first"])])

    The x-axis of charts is `update`, because a resumed run may log some updates twice.
    """

    name = "wandb"

    def __init__(self, project: str | None = None, **init: Any) -> None:
        """
        Args:
            project: default: the environment variable WANDB_PROJECT, or moe_bsr.
        """
        super().__init__("wandb")
        self.init = {"project": project or os.environ.get("WANDB_PROJECT") or "moe_bsr", **init}

    def begin(self, name: str, folder: os.PathLike, config: dict[str, Any]) -> None:
        given = {"name": name, "dir": str(folder), "config": config, **self.init}
        if self.run_id:
            given |= {"id": self.run_id, "resume": "allow"}
        self.run = self.api.init(**given)
        self.run_id = self.run.id
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log({"update": step, **values})

    def on_end(self, report: Mapping[str, Any]) -> None:
        self.run.summary.update(_results(report))

    def close(self) -> None:
        if getattr(self, "run", None) is not None:
            self.run.finish()


class MLflow(Tracker):
    """Logs to MLflow, with the tracking server and experiment set by its environment variables or the program."""

    name = "mlflow"
    status = "FAILED"

    def __init__(self, experiment: str | None = None) -> None:
        """
        Args:
            experiment: default: the environment variable MLFLOW_EXPERIMENT_NAME, or MLflow's default.
        """
        super().__init__("mlflow")
        self.experiment = experiment

    def begin(self, name: str, folder: os.PathLike, config: dict[str, Any]) -> None:
        if self.experiment is not None:
            self.api.set_experiment(self.experiment)
        going_on = self.run_id is not None
        # Nested, so that a run opened by the program itself stays open.
        run = self.api.start_run(run_id=self.run_id, run_name=name, nested=self.api.active_run() is not None)
        self.run_id, self.open = run.info.run_id, True
        if not going_on:  # MLflow refuses to change a logged parameter
            self.api.log_params({key: str(value)[:500] for key, value in _flat(config).items()})

    def log(self, values: dict[str, float], step: int) -> None:
        self.api.log_metrics(values, step=step)

    def on_end(self, report: Mapping[str, Any]) -> None:
        self.api.log_metrics(_results(report), step=report["step"])
        self.status = "FINISHED" if report["status"] == "finished" else "KILLED"

    def close(self) -> None:
        if getattr(self, "open", False):
            self.api.end_run(self.status)


def _results(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the report's main numbers."""
    found = {f"result/{task}/top1": about.get("top1") for task, about in report["tasks"].items()}
    names = ("mean_top1", "train_seconds", "measured_peak_mb", "predicted_peak_mb", "gflops_per_image")
    found |= {f"result/{name}": report[name] for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _flat(tree: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Flatten a nested dictionary to dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{place}{key}.") if isinstance(value, dict) and value else {f"{place}{key}": value}
    return found
