"""Callbacks: whoever wants to know what a training run does. The trainer emits events and knows no more.

A callback overrides what it needs of `Callback`. What it wrote is part of the run: `state` goes into every
checkpoint, and `restore` brings the callback's files back to exactly that point. A callback only looks on: one that
fails is named once and left out from then on (`Callbacks`).
"""

import copy
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
        essential: the run's own record. Its failure ends training, with everything saved that can be.
    """

    name: str = ""
    essential: bool = False

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
        name = getattr(callback, "name", "") or type(callback).__name__
        if name in named:
            raise ValueError(
                f"callbacks: two are named {name!r} ({type(named[name]).__name__} and {type(callback).__name__}); "
                "each needs a name of its own for its state in the checkpoint: set the attribute `name` of one"
            )
        named[name] = callback
    return named


class Callbacks:
    """A run's callbacks behind one guard: what only looks at training cannot stop it.

    The first exception of a callback becomes a warning; from then on it is called no more, but to close. An essential
    one's goes through.

    Attributes:
        named: the callbacks by name.
        failed: an essential one's OSError (a full disk) in `on_step` or `on_evaluate`. It is kept until all have been
            told, so that the trainer can save a state in which they agree.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        """
        Raises:
            ValueError: two callbacks of one name.
        """
        self.named = by_name(callbacks)
        self.failed: OSError | None = None
        self._silent: set[str] = set()
        self._states: dict[str, dict[str, Any]] = {}  # as last known; a silent callback's is kept

    def tell(self, hook: str, event: StartEvent | StepEvent | EvalEvent) -> None:
        """Call that hook of every callback."""
        for name, callback in self._listening():
            with self._guard(name, hook):
                try:
                    getattr(callback, hook)(event)
                except OSError as error:
                    if not _essential(callback) or hook == "on_start":
                        raise
                    self.failed = self.failed or error

    def end(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """What the callbacks add to a report."""
        added: dict[str, Any] = {}
        for name, callback in self._listening():
            with self._guard(name, "on_end"):
                values = dict(callback.on_end(copy.deepcopy(report)) or {})
                json.dumps(values)  # what is no JSON must not cost the report
                added |= values
        return added

    def state(self) -> dict[str, dict[str, Any]]:
        """The callbacks' states by name; of a silent one, the last it gave."""
        for name, callback in self._listening():
            with self._guard(name, "state"):
                self._states[name] = json.loads(json.dumps(dict(callback.state())))
        return dict(self._states)

    def restore(self, states: dict[str, dict[str, Any]]) -> None:
        """Bring the callbacks back to these states; one that has none starts afresh."""
        self._states = {name: states[name] for name in self.named if name in states}
        for name, callback in self._listening():
            with self._guard(name, "restore"):
                callback.restore(copy.deepcopy(states.get(name, {})))

    def close(self) -> None:
        """Close all of them, the silent ones too."""
        for name, callback in self.named.items():
            with self._guard(name, "close", essential=False):
                callback.close()

    def _listening(self) -> list[tuple[str, Callback]]:
        return [(name, callback) for name, callback in self.named.items() if name not in self._silent]

    @contextmanager
    def _guard(self, name: str, hook: str, essential: bool = True) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            if essential and _essential(self.named[name]):
                raise
            if name not in self._silent:
                self._silent.add(name)
                warnings.warn(
                    f"callback {name!r} failed in {hook}: {_told(error)}; it is left out from here on, and training "
                    "goes on without it",
                    stacklevel=4,
                )


def _essential(callback: Callback) -> bool:
    return getattr(callback, "essential", False)


def _told(error: BaseException) -> str:
    """An exception in one line."""
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = ""
    return f"{type(error).__name__}: {said:.300}".rstrip(": ")
