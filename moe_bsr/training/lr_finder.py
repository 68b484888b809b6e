"""Learning-rate finder (Smith 2017, as in fastai and Lightning): record the loss while the rate rises exponentially.

Each update has a larger learning rate than the one before. The rate at which the loss falls fastest is suitable for
training; at higher rates the loss rises and training would diverge. The sizes of the losses differ between tasks, so
each task's loss is divided by its first value and smoothed over the task's updates. The curve is the mean over tasks.
"""

import math
from dataclasses import dataclass
from statistics import fmean

from moe_bsr.training import prototypes
from moe_bsr.training.failures import NonFiniteLoss
from moe_bsr.training.trainer import Trainer

SMOOTHING = 0.7  # decay of the moving average of a task's loss, bias-corrected as in Adam
DIVERGED = 4.0  # the search ends when the curve exceeds this multiple of its lowest value


@dataclass(frozen=True)
class Point:
    """One update: its learning rate, the mean loss of its batches in nats, and the curve's value."""

    lr: float
    loss: float
    smoothed: float


def ramp(low: float, high: float, steps: int) -> list[float]:
    """Return `steps` rates from low to high, equally spaced on a log scale."""
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def curve(trainer: Trainer, rates: list[float]) -> list[Point]:
    """Take updates with these rates until the loss diverges. This changes the model.

    Args:
        trainer: one that has not started, of at least `len(rates)` updates.
    """
    prototypes.place(trainer.model, trainer.inputs, trainer.config.seed)
    relative, points = Smoothed(), []
    batches = trainer.batches()
    try:
        for step, rate in enumerate(rates):
            results, _ = trainer.take(batches, step, rate)
            tasks = trainer.sampler.tasks(step)
            value = relative.add({task: result.loss for task, result in zip(tasks, results, strict=True)})
            points.append(Point(rate, fmean(result.loss for result in results), value))
            if value > DIVERGED * min(point.smoothed for point in points):
                break
    except NonFiniteLoss:
        pass
    finally:
        batches.close()
    return points


class Smoothed:
    """Mean over the tasks seen so far of their smoothed losses, each divided by its first loss."""

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
    """Return the rate at which the curve falls fastest before its lowest point, or None if it never falls.

    The slope is taken over a tenth of the curve, because adjacent points differ by noise, and the rate is in the middle
    of that interval.
    """
    window = max(1, len(points) // 10)
    lowest = min(range(len(points)), key=lambda i: points[i].smoothed, default=0)
    falls = [
        (points[i + window].smoothed - points[i].smoothed, math.sqrt(points[i].lr * points[i + window].lr))
        for i in range(window, lowest + 1 - window)
    ]
    slope, rate = min(falls, default=(0.0, 0.0))
    return rate if slope < 0 else None
