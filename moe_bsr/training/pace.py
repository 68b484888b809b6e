"""Convert `train.minutes` into a number of updates by timing a few of them.

The timed updates have a learning rate of 0. They run once with new images and once again with the same images, which
are cached by then. They leave no trace in the model, but their time counts as training time. So a run of
`train.minutes` has the same bits as a run of that many `train.steps`. The minutes cover the updates; evaluations and
the start of the run come on top.

If the machine becomes slower in the middle of a run, `Deadline` lowers the number, and the schedule of the learning
rate with it. The bits are then those of a run whose `train.steps` was lowered at that update.
"""

import math
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_bsr.config.train import MOST_STEPS
from moe_bsr.runs.checkpoint import CheckpointError
from moe_bsr.training.length import images_per_update, updates_of

if TYPE_CHECKING:
    from moe_bsr.training.trainer import Trainer

MEASURED = 20  # most updates that are timed, in each of the two passes
SHARE = 0.02  # share of the minutes that each pass may take
CHECKS = 20  # times per run that the number of updates may be lowered
OVERRUN = 1.1  # a run is not shortened if it is expected to take at most this factor of its minutes


def updates_decided(trainer: "Trainer") -> tuple[int, list[str]]:
    """Return how many updates a run has, and notes for the user about it.

    Raises:
        CheckpointError: the run resumes from a later update.
    """
    state, minutes, before = trainer.state, trainer.config.train.minutes, trainer.state.length.steps
    steps, notes = updates_of(trainer.config, trainer.sizes), []
    if minutes is not None:
        if state.length.minutes == minutes:
            steps = before
        elif state.step:
            steps = state.step + max(0, int((60 * minutes - state.seconds) * state.step / state.seconds))
        else:
            steps = updates_within(60 * minutes, trainer)
        notes.append(f"train.minutes = {minutes:g}: {steps} updates at this machine's speed")
    if state.step > steps:
        place = trainer.folder / "checkpoint" / str(state.step)
        raise CheckpointError(f"{place} is after the run's last step, train.steps = {steps}")
    if before not in (0, steps):
        notes.append(f"planned length changed from {before} to {steps} updates")
    return steps, notes


def updates_within(seconds: float, trainer: "Trainer") -> int:
    """Measure how many updates fit into `seconds`, in a run that has not begun. The time spent counts as the run's."""
    state, model = trainer.state, trainer.model
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    began = time.monotonic()
    first = _seconds_each(trainer, MEASURED, SHARE * seconds)
    again = _seconds_each(trainer, len(first), SHARE * seconds) if trainer.inputs.keeps_all() else first
    state.seconds += time.monotonic() - began
    state.optimizer.state.clear()
    for name, value in model.named_buffers():
        value.copy_(buffers[name])
    if state.average is not None:
        state.average.updates = 0
    new, left = _with_new_images(trainer), max(0.0, seconds - state.seconds)
    return trainer.ranks.share(_within(left, new, _mean(first), min(_mean(first), _mean(again))))


class Deadline:
    """Lowers the number of updates of a run that would exceed its `train.minutes` by more than a tenth."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer, self.times = trainer, []  # seconds of each update since the last check
        self.new = _with_new_images(trainer)
        self.every = max(1, trainer.planned.train.steps // CHECKS)

    def steps_after(self, seconds: float) -> int:
        """Count the seconds of the last update as the run's, and return how many updates the run has from now on."""
        state, planned, minutes = self.trainer.state, self.trainer.planned.train, self.trainer.config.train.minutes
        state.seconds += seconds
        self.times.append(seconds)
        if minutes is None or state.step % self.every or state.step >= planned.steps:
            return planned.steps
        typical, self.times = statistics.median(self.times), []
        # Updates after those with new images may be faster, as images or features are cached by then.
        until = self.new if state.step < self.new < planned.steps else planned.steps
        steps = planned.steps
        if state.seconds + typical * (until - state.step) > OVERRUN * 60 * minutes:
            fitting = int(max(0.0, 60 * minutes - state.seconds) / typical)
            steps = min(steps, max(state.step + fitting, state.step + 1, planned.warmup_steps or 0))
        return self.trainer.ranks.share(steps)


def _with_new_images(trainer: "Trainer") -> int:
    """Return how many updates of a run see images for the first time that are cached later."""
    images = trainer.inputs.new_epochs() * sum(trainer.sizes.values())
    return math.ceil(images / images_per_update(trainer.config, trainer.sizes))


def _within(seconds: float, new: int, first: float, later: float) -> int:
    """Return the updates in `seconds`, if the first `new` updates take `first` seconds each, and the others `later`."""
    steps = seconds / first if seconds < new * first else new + (seconds - new * first) / later
    return min(MOST_STEPS, max(1, int(steps)))


def _mean(times: list[float]) -> float:
    """Return the mean without the first update, which also selects kernels, and without the slowest of the others.

    Few updates are timed, so that a single stall of the machine would halve the length of a run.
    """
    typical = sorted(times[1:])[:-1]
    return sum(typical) / len(typical)


def _seconds_each(trainer: "Trainer", count: int, limit: float) -> list[float]:
    """Return the seconds of each of the first updates: at least three, at most `count`, within `limit` seconds."""
    updates, times = _idle_updates(trainer), [time.monotonic()]
    while trainer.ranks.share(len(times) < 4 or (len(times) <= count and times[-1] - times[0] < limit)):
        next(updates)
        times.append(time.monotonic())
    updates.close()
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def _idle_updates(trainer: "Trainer") -> Iterator[None]:
    batches = trainer.batches()
    try:
        for step in range(trainer.planned.train.steps):
            trainer.take(batches, step, 0.0)
            trainer.ranks.numbers()  # discard the exchange statistics of this update
            yield
    finally:
        batches.close()
