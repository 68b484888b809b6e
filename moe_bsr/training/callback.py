"""Callbacks: objects that receive the events of a training run. The trainer only emits events.

A callback overrides the hooks of `Callback` that it needs. Its output is part of the run: its `state` goes into every
checkpoint, and `restore` resets its files to exactly that point. A callback cannot stop training: after its first
exception it is named in a warning and no longer called (`Callbacks`).
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
    """A run is about to start or to resume.

    Attributes:
        folder: the run folder. step: updates done before.
        about: lines that describe the run to a user.
        model, data, transforms, runtime: the trainer's own objects. Callbacks must not change them.
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
        step: number of updates done, including this one.
        metrics: numbers by name, without timings: the same configuration gives the same values.
        progress: updates, images and epochs of each task so far.
        outputs: the model's output for each micro-batch (graphs already freed).
        images_per_second: speed of this update alone.
    """

    step: int
    task: str
    metrics: dict[str, float]
    progress: dict[str, dict[str, float]]
    outputs: list[Output]
    images_per_second: float


@dataclass(slots=True)
class EvalEvent:
    """Scores of every task on one split, as `evaluation.evaluate` returns them. step: number of updates done."""

    step: int
    split: str
    scores: dict[str, dict[str, Any]]


@dataclass(slots=True)
class PlanEvent:
    """The planned number of updates was lowered, because the run would have exceeded its `train.minutes`.

    Attributes:
        step: number of updates done. steps: planned from now on. before: planned until now.
    """

    step: int
    steps: int
    before: int


class Callback:
    """Base class of all callbacks; its hooks do nothing.

    Attributes:
        name: key of its state in a checkpoint; if empty, the class name is used. The names within a run must differ.
        essential: True for the run's own record. Its failure ends training, after saving what can be saved.
    """

    name: str = ""
    essential: bool = False

    def on_start(self, start: StartEvent) -> None:
        """Called before the first update."""

    def on_step(self, step: StepEvent) -> None:
        """Called after each update, once for each task trained in it."""

    def on_evaluate(self, evaluation: EvalEvent) -> None:
        """Called after each evaluation."""

    def on_plan(self, plan: PlanEvent) -> None:
        """Called when the number of updates is lowered during the run."""

    def on_end(self, report: Mapping[str, Any]) -> dict[str, Any] | None:
        """Called after the last event. Returns JSON values by name to add to the report, or None."""

    def close(self) -> None:
        """Called at the end in any case, also when training failed."""

    def state(self) -> dict[str, Any]:
        """Write everything to disk, and return JSON values from which `restore` can undo later writes."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Called before `on_start` with the `state` saved in the checkpoint, or with {} in a new run."""


def by_name(callbacks: Iterable[Callback]) -> dict[str, Callback]:
    """Return the callbacks by the names under which their states are saved.

    Raises:
        ValueError: two callbacks have the same name.
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
    """Calls all callbacks of a run, and keeps their exceptions from stopping it.

    The first exception of a callback becomes a warning, and only its `close` is called from then on. Exceptions of
    essential callbacks are raised.

    Attributes:
        named: the callbacks by name.
        failed: an OSError (a full disk) of an essential callback in `on_step` or `on_evaluate`. It is stored until all
            callbacks have received the event, so that the trainer can save a consistent state before raising it.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        """
        Raises:
            ValueError: two callbacks have the same name.
        """
        self.named = by_name(callbacks)
        self.failed: OSError | None = None
        self._muted: set[str] = set()
        self._states: dict[str, dict[str, Any]] = {}  # the last state of each, failed callbacks included

    def tell(self, hook: str, event: StartEvent | StepEvent | EvalEvent | PlanEvent) -> None:
        """Call the named hook of every callback with this event."""
        for name, callback in self._listening():
            with self._guard(name, hook):
                try:
                    getattr(callback, hook)(event)
                except OSError as error:
                    if not _essential(callback) or hook == "on_start":
                        raise
                    self.failed = self.failed or error

    def end(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that the callbacks add to the report."""
        added: dict[str, Any] = {}
        for name, callback in self._listening():
            with self._guard(name, "on_end"):
                values = dict(callback.on_end(copy.deepcopy(report)) or {})
                json.dumps(values)  # raises here, inside the guard, if a value is not JSON
                added |= values
        return added

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the callbacks' states by name; for a failed callback, its last state."""
        for name, callback in self._listening():
            with self._guard(name, "state"):
                self._states[name] = json.loads(json.dumps(dict(callback.state())))
        return dict(self._states)

    def restore(self, states: dict[str, dict[str, Any]]) -> None:
        """Reset the callbacks to these states. A callback without a state starts anew."""
        self._states = {name: states[name] for name in self.named if name in states}
        for name, callback in self._listening():
            with self._guard(name, "restore"):
                callback.restore(copy.deepcopy(states.get(name, {})))

    def close(self) -> None:
        """Close all callbacks, including those that failed."""
        for name, callback in self.named.items():
            with self._guard(name, "close", essential=False):
                callback.close()

    def _listening(self) -> list[tuple[str, Callback]]:
        return [(name, callback) for name, callback in self.named.items() if name not in self._muted]

    @contextmanager
    def _guard(self, name: str, hook: str, essential: bool = True) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            if essential and _essential(self.named[name]):
                raise
            if name not in self._muted:
                self._muted.add(name)
                warnings.warn(
                    f"callback {name!r} failed in {hook}: {_described(error)}; it is not called any more, and training "
                    "goes on without it",
                    stacklevel=4,
                )


def _essential(callback: Callback) -> bool:
    return getattr(callback, "essential", False)


def _described(error: BaseException) -> str:
    """Format an exception in one line."""
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = ""
    return f"{type(error).__name__}: {said:.300}".rstrip(": ")
