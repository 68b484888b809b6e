"""Runs of about a second: two generated tasks of unequal size and a backbone of six narrow blocks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_bsr import api
from moe_bsr import config as configuration
from moe_bsr.callbacks.jsonl import Jsonl
from moe_bsr.config import Config
from moe_bsr.evaluation.evaluate import evaluate
from moe_bsr.model.multitask import build
from moe_bsr.runs import folder as run
from moe_bsr.runtime.device import prepare
from moe_bsr.training import trainer as trainer_module
from moe_bsr.training.callback import Callback, StepEvent
from moe_bsr.training.trainer import Trainer

TASKS = {"shapes": (10, 30), "fractals": (12, 60)}  # classes, images before some are held out for validation
SIZES = {"shapes": 23, "fractals": 51}  # training images without those for validation
# Only the last block trains and has experts. Updates are then cheap, for tests of other parts than the model.
LATE = {"plan__train_blocks": [5], "plan__drop_blocks": [3], "plan__moe_blocks": [5]}
TASK = "{{title: {0}, source: generated, family: {0}, classes: {1}, train: {2}, test: {1}, license: none}}\n"


def make_config(folder: Path, **changes) -> Config:
    """Return a run of eight updates of eight images, with experts, token dropping and changes (`train__steps=4`)."""
    paths = []
    for name, (classes, count) in TASKS.items():
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(TASK.format(name, classes, count))
    config = configuration.from_dict(
        {
            "tasks": [str(path) for path in paths],
            "backbone": {"name": "test_vit", "weights": "random", "image_size": 32},
            "plan": {"train_blocks": [1, 3, 5], "drop_blocks": [1, 3], "moe_blocks": [3, 5]},
            "moe": {"num_experts": 4, "top_k": 2, "mlp_ratio": 3},
            "train": {"steps": 8, "batch_size": 8, "lr": 1e-2, "checkpoint_every": 3},
            "runtime": {"device": "cpu", "precision": "fp32", "threads": 1},
        }
    )
    return configuration.replace(config, **changes)


def replace_task(config: Config, task: str) -> Config:
    """Return the same configuration with another task instead of both."""
    return configuration.replace(config, tasks=[task])


def make_trainer(config: Config, folder: Path, callbacks: list[Callback] | None = None) -> Trainer:
    """Return the trainer that `train` would build, with these callbacks."""
    tasks = {name: run.open_task(config, file) for name, file in config.task_files().items()}
    model = build(config, {name: len(data.class_names) for name, data in tasks.items()})
    return api.make_trainer(config, model, tasks, prepare(config.runtime), folder, callbacks or [])


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Snapshots(Callback):
    """Records the model's state and the task after every update."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.states: list[dict[str, Tensor]] = []
        self.tasks: list[str] = []

    def on_step(self, step: StepEvent) -> None:
        self.states.append(state_of(self.trainer.model))
        self.tasks.append(step.task)


def watch(config: Config, folder: Path, *callbacks: Callback) -> tuple[Trainer, Snapshots]:
    """Return a trainer and its snapshots. The first snapshot is the initial state."""
    snapshots = Snapshots()
    snapshots.trainer = make_trainer(config, folder, [snapshots, *callbacks])
    snapshots.states.append(state_of(snapshots.trainer.model))
    return snapshots.trainer, snapshots


def script_scores(monkeypatch, means: list[float]) -> list[tuple[str, Tensor]]:
    """Replace validation top-1 by `means` in turn and test top-1 by 50. Returns a list of (split, head weight)."""
    seen, turns = [], iter(means)

    def scripted(model, data, split, *arguments):
        if data.name == "shapes":
            seen.append((split, model.heads["shapes"].weight.detach().clone()))
            scripted.mean = next(turns) if split == "val" else 50.0
        return evaluate(model, data, split, *arguments) | {"top1": scripted.mean}

    monkeypatch.setattr(trainer_module, "evaluate", scripted)
    return seen


class Crash(Exception):
    """Stand-in for whatever ends a process in the middle of a run."""


def act_at(monkeypatch, step: int, action) -> None:
    """Call `action` after update `step` has been written to metrics.jsonl."""
    write = Jsonl.on_step

    def on_step(self, record: StepEvent) -> None:
        write(self, record)
        if record.step == step:
            action()

    monkeypatch.setattr(Jsonl, "on_step", on_step)


def crash() -> None:
    raise Crash


def crashed_and_resumed(monkeypatch, config: Config, folder: Path, resumed: Config | None = None) -> Trainer:
    """Return the trainer of a run that crashed in its third update and was resumed (with another configuration)."""
    with monkeypatch.context() as patch:
        act_at(patch, 3, crash)
        with pytest.raises(Crash):
            make_trainer(config, folder, [Jsonl(folder)]).fit()
    trainer = make_trainer(resumed or config, folder)
    trainer.fit(resume=True)
    return trainer


def finished(config: Config, folder: Path) -> Trainer:
    """Return the trainer of a finished run."""
    trainer = make_trainer(config, folder)
    trainer.fit()
    return trainer


def assert_resumed_is_whole(monkeypatch, whole: Trainer, folder: Path) -> Trainer:
    """Crash and resume the run of `whole`, and assert that all weights and optimizer states are the same."""
    resumed = crashed_and_resumed(monkeypatch, whole.config, folder)
    for group in ("weights", "optimizer"):
        ours, theirs = resumed.state.state_dict()[group], whole.state.state_dict()[group]
        assert ours.keys() == theirs.keys()
        assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == [], group
    return resumed
