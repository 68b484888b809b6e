"""A learning-rate finder (Smith 2017, as fastai and Lightning have it): the loss while the rate rises exponentially.

Each update has a larger learning rate than the one before. Where the loss falls fastest is a rate to train with; soon
after, it rises and training would diverge. Tasks have losses of their own size, so each one's is told relative to its
first, smoothed over its own updates, and the curve is their mean.
"""

import math
from dataclasses import dataclass
from statistics import fmean

from moe_bsr.training import prototypes
from moe_bsr.training.failures import NonFiniteLoss
from moe_bsr.training.trainer import Trainer

SMOOTHING = 0.7  # of a task's loss; corrected for the start as Adam's moments are
DIVERGED = 4.0  # times the lowest value, at which the search ends


@dataclass(frozen=True)
class Point:
    """One update: its learning rate, the mean loss of its batches in nats, and the curve up to there."""

    lr: float
    loss: float
    smoothed: float


def ramp(low: float, high: float, steps: int) -> list[float]:
    """So many rates from low to high, in equal ratios."""
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def curve(trainer: Trainer, rates: list[float]) -> list[Point]:
    """The updates of a run that has not begun, with these rates, as far as it does not diverge. The model is changed.

    Args:
        trainer: of at least as many updates.
    """
    prototypes.place(trainer.model, trainer.inputs, trainer.config.seed)
    relative, points = Smoothed(), []
    batches = trainer.batches()
    try:
        for step, rate in enumerate(rates):
            results, _ = trainer.take(batches, step, rate)
            trainer.state.step = step + 1
            tasks = trainer.sampler.tasks(step)
            value = relative.add({task: result.loss for task, result in zip(tasks, results, strict=True)})
            points.append(Point(rate, fmean(result.loss for result in results), value))
            if value > DIVERGED * min(point.smoothed for point in points):
                break
    except NonFiniteLoss:
        pass
    finally:
        batches.close()
        trainer.state.step = 0
    return points


class Smoothed:
    """Mean over the tasks seen so far of their smoothed losses, each relative to its first."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, losses: dict[str, float]) -> float:
        for task, loss in losses.items():
            first = self._first.setdefault(task, loss or 1.0)
            value, count = self._sums.get(task, (0.0, 0))
            self._sums[task] = SMOOTHING * value + (1 - SMOOTHING) * loss / first, count + 1
        return fmean(value / (1 - SMOOTHING**count) for value, count in self._sums.values())


def steepest(points: list[Point]) -> float | None:
    """The rate at which the curve falls fastest before its lowest point; None where it never falls.

    Measured over a tenth of the curve, for neighbors differ by noise; the rate is the one in the middle.
    """
    window = max(1, len(points) // 10)
    lowest = min(range(len(points)), key=lambda i: points[i].smoothed, default=0)
    falls = [
        (points[i + window].smoothed - points[i].smoothed, math.sqrt(points[i].lr * points[i + window].lr))
        for i in range(window, lowest + 1 - window)
    ]
    slope, rate = min(falls, default=(0.0, 0.0))
    return rate if slope < 0 else None
