"""How long a run is, in updates: `train.steps` says it, `train.epochs` and `train.minutes` come to it.

Epochs are of all training images of all tasks together. What minutes come to is measured (`pace`).
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from moe_bsr.config import Config
from moe_bsr.data.sampler import MultitaskSampler

UNKNOWN = 1000  # updates that a run of minutes is taken for until they are measured


@dataclass(slots=True)
class Length:
    """How long a run is planned to be, and was.

    Attributes:
        steps: updates; 0 before it is decided. minutes: that they were decided for, if they were.
        earlier: (step, steps): up to the update `step` the run was to have `steps`.
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
    """The same run with its length given in updates.

    Raises:
        ConfigError: train.warmup_steps are more than these.
    """
    return replace(config, train=replace(config.train, steps=steps, epochs=None, minutes=None))


def updates_of(config: Config, sizes: dict[str, int]) -> int | None:
    """Updates of a run; None if that is to be measured.

    Args:
        sizes: training images by task.
    Raises:
        ConfigError: more than a run may have.
    """
    train = config.train
    if train.optimizer == "lbfgs":  # however many images its minutes allow
        return 1
    if config.mode == "single_task" and len(sizes) > 1:  # each has a run of its own
        counts = [updates_of(config, {task: size}) for task, size in sizes.items()]
        return None if None in counts else max(counts)
    if train.epochs is None:
        return train.steps
    steps = math.ceil(train.epochs * sum(sizes.values()) / images_per_update(config, sizes))
    return in_updates(config, steps).train.steps


def images_per_update(config: Config, sizes: dict[str, int]) -> int:
    first = MultitaskSampler(sizes, config.train.batch_size, 1, config.sampler, config.seed).tasks(0)
    return config.train.batch_size * len(first)


def told(config: Config, sizes: dict[str, int]) -> str:
    """A run's length in words."""
    steps, train = updates_of(config, sizes), config.train
    if train.minutes is not None:
        return f"updates for {train.minutes:g} minutes, as many as this machine takes"
    return f"{steps} updates" if train.epochs is None else f"{steps} updates ({train.epochs:g} epochs)"
