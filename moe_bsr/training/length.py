"""Length of a run in updates, computed from `train.steps` or `train.epochs`.

An epoch is one pass over all training images of all tasks together. `pace` converts `train.minutes` by measuring.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from moe_bsr.config import Config
from moe_bsr.data.sampler import MultitaskSampler

UNKNOWN = 1000  # assumed updates of a run of `train.minutes` until its speed is measured


@dataclass(slots=True)
class Length:
    """Planned length of a run, and its earlier plans.

    Attributes:
        steps: number of updates; 0 before it is decided. minutes: the `train.minutes` that `steps` was measured for.
        earlier: pairs (step, steps): until update `step` the planned length was `steps`.
    """

    steps: int = 0
    minutes: float | None = None
    earlier: list[tuple[int, int]] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        return {"steps": self.steps, "minutes": self.minutes, "earlier": [list(each) for each in self.earlier]}

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Length":
        return cls(values["steps"], values["minutes"], [(step, steps) for step, steps in values["earlier"]])


def in_updates(config: Config, steps: int) -> Config:
    """Return the configuration with its length given in updates.

    Raises:
        ConfigError: train.warmup_steps is larger.
    """
    return replace(config, train=replace(config.train, steps=steps, epochs=None, minutes=None))


def updates_of(config: Config, sizes: dict[str, int]) -> int | None:
    """Return the number of updates of a run; None if it has to be measured (`train.minutes`).

    Args:
        sizes: training images by task.
    Raises:
        ConfigError: more updates than a run may have.
    """
    train = config.train
    if train.optimizer == "lbfgs":  # its minutes limit the images, not the updates
        return 1
    if config.mode == "single_task" and len(sizes) > 1:  # each task has its own run
        counts = [updates_of(config, {task: size}) for task, size in sizes.items()]
        return None if None in counts else max(counts)
    if train.epochs is None:
        return train.steps
    steps = math.ceil(train.epochs * sum(sizes.values()) / images_per_update(config, sizes))
    return in_updates(config, steps).train.steps


def images_per_update(config: Config, sizes: dict[str, int]) -> int:
    first = MultitaskSampler(sizes, config.train.batch_size, 1, config.sampler, config.seed).tasks(0)
    return config.train.batch_size * len(first)


def described(config: Config, sizes: dict[str, int]) -> str:
    """Return a run's length in words."""
    steps, train = updates_of(config, sizes), config.train
    if train.minutes is not None:
        return f"{train.minutes:g} minutes of updates"
    return f"{steps} updates" if train.epochs is None else f"{steps} updates ({train.epochs:g} epochs)"
