"""What `train.minutes` come to: how many updates this machine takes in a time.

A few updates at a learning rate of 0 tell, once with images that are new and once with the same ones again, which are
cached then. Nothing of them is left but their time, which counts. So a run of minutes is, bit for bit, the run of as
many steps. Minutes are those of the updates; evaluations and the start of a run come on top.
"""

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_bsr.config.train import MOST_STEPS
from moe_bsr.runs.checkpoint import CheckpointError
from moe_bsr.training.length import images_per_update, updates_of

if TYPE_CHECKING:
    from moe_bsr.training.trainer import Trainer

MEASURED = 20  # updates at most that are measured, and then again
SHARE = 0.02  # of the time, that either may take


def updates_decided(trainer: "Trainer") -> tuple[int, list[str]]:
    """How many updates a run has, and what a person should know about it.

    Raises:
        CheckpointError: it goes on from a later one.
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
        notes.append(f"train.minutes = {minutes:g}: {steps} updates at this machine's pace")
    if state.step > steps:
        place = trainer.folder / "checkpoint" / str(state.step)
        raise CheckpointError(f"{place} is of a step after the run's last, train.steps = {steps}")
    if before not in (0, steps):
        notes.append(f"the run was to have {before} updates, now it has {steps}")
    return steps, notes


def updates_within(seconds: float, trainer: "Trainer") -> int:
    """How many updates of a run that has not begun take so long; what measuring takes is in the run's seconds."""
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
    images = trainer.inputs.new_epochs() * sum(trainer.sizes.values())
    new = math.ceil(images / images_per_update(trainer.config, trainer.sizes))
    steps = _within(max(0.0, seconds - state.seconds), new, _mean(first), min(_mean(first), _mean(again)))
    return trainer.ranks.share(steps)


def _within(seconds: float, new: int, first: float, later: float) -> int:
    """Updates in so many seconds, of which the first `new` take `first` seconds each and the others `later`."""
    steps = seconds / first if seconds < new * first else new + (seconds - new * first) / later
    return min(MOST_STEPS, max(1, int(steps)))


def _mean(times: list[float]) -> float:
    return sum(times[1:]) / len(times[1:])  # kernels are chosen in the first


def _seconds_each(trainer: "Trainer", count: int, limit: float) -> list[float]:
    """Seconds of each of the first updates: two at least, and `count` at most, for as long as `limit` lasts."""
    updates, times = _idle_updates(trainer), [time.monotonic()]
    while trainer.ranks.share(len(times) < 3 or (len(times) <= count and times[-1] - times[0] < limit)):
        next(updates)
        times.append(time.monotonic())
    updates.close()
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def _idle_updates(trainer: "Trainer") -> Iterator[None]:
    batches = trainer.batches()
    try:
        for step in range(trainer.planned.train.steps):
            trainer.take(batches, step, 0.0)
            trainer.ranks.numbers()  # of an update that is none of the run's
            yield
    finally:
        batches.close()
