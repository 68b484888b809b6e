"""Callbacks: whoever wants to know what a training run does. The trainer emits events and knows no more.

A callback overrides what it needs of `Callback`. What it wrote is part of the run: `state` goes into every
checkpoint, and `restore` brings the callback's files back to exactly that point.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_bsr.config import Config
from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.model.multitask import MultitaskViT, Output
from moe_bsr.runtime.device import Runtime


@dataclass(slots=True)
class StartEvent:
    """The run about to start or go on.

    Attributes:
        folder: of the run. step: updates done before.
        about: lines worth telling a person.
        model, data, transforms, runtime: the trainer's own, to look at and leave as they are.
    """

    folder: Path
    config: Config
    tasks: list[str]
    step: int
    about: list[str]
    model: MultitaskViT
    data: dict[str, TaskData]
    transforms: ImageTransforms
    runtime: Runtime


@dataclass(slots=True)
class StepEvent:
    """One task's share of one optimizer update.

    Attributes:
        step: updates done, this one included.
        metrics: named numbers, a function of the configuration alone.
        progress: updates, images and epochs of each task so far.
        outputs: what the model returned for each micro-batch (graphs already freed).
        images_per_second: of this update alone.
    """

    step: int
    task: str
    metrics: dict[str, float]
    progress: dict[str, dict[str, float]]
    outputs: list[Output]
    images_per_second: float


@dataclass(slots=True)
class EvalEvent:
    """Scores of every task on one split, as `evaluation.evaluate` returns them."""

    step: int
    split: str
    scores: dict[str, dict[str, Any]]


class Callback:
    """Does nothing; the base of all callbacks.

    Attributes:
        name: under which its state is in a checkpoint; the class's name where it is empty. Two callbacks of one
            run need different names.
    """

    name: str = ""

    def on_start(self, start: StartEvent) -> None:
        """Before the first update."""

    def on_step(self, step: StepEvent) -> None:
        """After each update, once per task trained in it."""

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        """After each evaluation."""

    def on_end(self, report: Mapping[str, Any]) -> dict[str, Any] | None:
        """After the last event. What is returned (JSON values by name) is added to the report."""

    def close(self) -> None:
        """Always called at the end, also when training failed."""

    def state(self) -> dict[str, Any]:
        """JSON values from which `restore` can undo what is written later; everything is on disk."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Called before `on_start` with what `state` returned at the checkpoint; {} at a fresh start."""


def by_name(callbacks: Iterable[Callback]) -> dict[str, Callback]:
    """Callbacks by the names under which their states are kept.

    Raises:
        ValueError: two have one name.
    """
    named: dict[str, Callback] = {}
    for callback in callbacks:
        name = callback.name or type(callback).__name__
        if name in named:
            raise ValueError(
                f"callbacks: two are named {name!r} ({type(named[name]).__name__} and {type(callback).__name__}); "
                "each needs a name of its own for its state in the checkpoint: set the attribute `name` of one"
            )
        named[name] = callback
    return named
