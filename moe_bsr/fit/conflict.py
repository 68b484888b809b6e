"""Do tasks get in each other's way? What blocks of its own bring a task over blocks that all tasks share.

The conflict index of a task is its accuracy when it has the trained blocks to itself, less that when all tasks share
them, at equally many updates of the task, on the same images in the same order. Above 0 tasks conflict; below 0 they
help each other, and nothing that keeps tasks apart can be of use. (Gradients' cosines do not predict it: Mueller et
al., TMLR 2025.) Both forms train through the ordinary trainer, without experts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from moe_bsr import api
from moe_bsr import config as configuration
from moe_bsr.config import Config, require

# Student's t: 97.5 % lie below, by degrees of freedom from 1 on.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
FORMS = ("shared", "apart")


@dataclass(frozen=True, slots=True)
class Index:
    """Of one task, or of their mean.

    Attributes:
        shared, apart: top-1 in percent, a value for each seed.
        low, high: 95 % interval of the index over seeds, points; None with one seed.
    """

    shared: list[float]
    apart: list[float]

    @property
    def mean(self) -> float:
        """The index: points that blocks of its own bring, mean over seeds."""
        return fmean(self._gains())

    @property
    def interval(self) -> tuple[float, float] | None:
        gains = self._gains()
        if len(gains) == 1:
            return None
        half = student(len(gains) - 1) * stdev(gains) / math.sqrt(len(gains))
        return self.mean - half, self.mean + half

    def _gains(self) -> list[float]:
        return [a - s for a, s in zip(self.apart, self.shared, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        return {"index": self.mean, "interval": self.interval, "shared": self.shared, "apart": self.apart}


def student(freedom: int) -> float:
    """Student's t that 97.5 % lie below; to 0.002."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    return 1.95996 + 2.3723 / freedom + 2.8225 / freedom**2 + 2.556 / freedom**3  # the first terms of its expansion


def measure(
    config: Config,
    folder: Path,
    updates: int,
    seeds: list[int],
    split: str = "val",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Index]:
    """The index of each task, and as "mean" of their mean.

    Args:
        folder: for the runs, FORM_SEED; finished ones are not repeated, so that a stopped measurement goes on.
        updates: of each task, in either form. split: "val" or "test".
    Raises:
        ConfigError: a single task, a plan that trains no block, or a folder with runs of another configuration.
        KeyboardInterrupt: training was stopped by a signal.
    """
    names = config.task_names()
    require(len(names) > 1, "tasks", names, "two at least: one task has nobody to be in conflict with")
    trains = config.plan.train_blocks != [] or config.adapter is not None
    require(trains, "plan.train_blocks", config.plan.train_blocks, "some: heads alone share nothing that trains")
    found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for seed in seeds:
        for form in FORMS:
            place = folder / f"{form}_{seed}"
            report = api.train(planned(config, form, updates, seed), place, resume=True, callbacks=[])
            if report["status"] == "interrupted":
                raise KeyboardInterrupt
            told = api.evaluate(place, split)
            found[form].append({task: told["tasks"][task]["top1"] for task in names} | {"mean": told["mean_top1"]})
            say(f"seed {seed}, {form}: {told['mean_top1']:.1f} % in the mean, {report['train_seconds']:.0f} s")
    return {
        name: Index([run[name] for run in found["shared"]], [run[name] for run in found["apart"]])
        for name in (*names, "mean")
    }


def planned(config: Config, form: str, updates: int, seed: int) -> Config:
    """The configuration of one form: every task has so many updates."""
    shared = form == "shared"
    count = len(config.task_names()) if shared else 1
    warmup = config.train.warmup_steps
    quiet = {"eval_every": None, "patience": None, "evaluate_test": False, "pictures": False, "log_to": []}
    length = {"steps": updates * count, "epochs": None, "minutes": None}
    length["warmup_steps"] = None if warmup is None else min(warmup, updates) * count
    return configuration.replace(
        config,
        seed=seed,
        mode="multitask" if shared else "single_task",
        plan__moe_blocks=[],
        sampler__kind="round_robin",
        **{f"train__{key}": value for key, value in (quiet | length).items()},
    )
