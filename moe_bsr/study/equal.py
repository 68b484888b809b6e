"""Accuracy of a method under equal conditions: the same number of updates, then the same number of seconds.

Every method gets the same tuning budget: three learning rates, compared on validation images after equally many
updates. The best rate is then used in a timed run, which is scored once on the test images.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

from moe_bsr.config import Config, replace
from moe_bsr.config.methods import Method
from moe_bsr.evaluation.metrics import half_width
from moe_bsr.model.multitask import build
from moe_bsr.runs.folder import make_transforms, open_task
from moe_bsr.runtime.device import prepare
from moe_bsr.study import budgets, rivals, sweep
from moe_bsr.training.failures import NonFiniteLoss

FACTORS = (1 / 3, 1.0, 3.0)  # multiples of the method's own learning rate
PLAIN = "timm_full"  # name of the plain timm code in `budgets`


def at_equal_updates(name: str, method: Method, base: Config, folder: Path, updates: int) -> dict[str, Any] | None:
    """Train with three learning rates and return the best mean validation accuracy; None for a solved probe.

    Args:
        folder: for the runs. A finished run in it is not trained again.
        updates: number of optimizer updates of each run.
    Returns:
        updates;
        rates: mean validation top-1 in percent by learning rate, 0 for a rate that diverged;
        factor: best rate over the method's own rate;
        val_top1: mean top-1 in percent at the best rate;
        val_half_width: half width of its 95 % interval over validation images.
    Raises:
        sweep.Interrupted: a signal stopped a run.
    """
    if method.code == "probe":
        return None
    quiet = {"train__eval_every": None, "train__evaluate_test": False, "train__pictures": False}
    length = {"train__epochs": None, "train__minutes": None, "train__steps": updates}
    found = {}
    for factor in FACTORS:
        changed = replace(base, **quiet, **length, train__lr=factor * base.train.lr)
        place = folder / f"{name}_{updates}_{factor:.2f}"
        found[factor] = _plain(changed, updates) if method.code == "timm" else _ours(method.of(changed), place)
    best = max(found, key=lambda factor: _mean(found[factor]))
    sizes = {task: len(open_task(base, file).val) for task, file in base.task_files().items()}
    return {
        "updates": updates,
        "rates": {f"{factor * method.lr_scale * base.train.lr:.3g}": _mean(top1) for factor, top1 in found.items()},
        "factor": best,
        "val_top1": _mean(found[best]),
        "val_half_width": half_width(found[best], sizes),
    }


def at_equal_seconds(
    name: str, method: Method, base: Config, folder: Path, minutes: float, factor: float, seed: int
) -> dict[str, Any]:
    """Train for `minutes`, counted from opening the images, in a process of its own, and score the test images.

    Args:
        factor: learning rate over the method's own rate.
    Returns:
        One run as in `budgets.race`, and half_width of its 95 % interval over test images.
    """
    changed = replace(base, seed=seed, train__lr=factor * base.train.lr)
    name = PLAIN if method.code == "timm" else name
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="race_", dir=folder))  # a run that was stopped begins again
    (told,) = budgets.race(changed, place, [minutes], [name], [seed], lambda line: None, {name: method})["runs"]
    sizes = {task: len(open_task(base, file).test) for task, file in base.task_files().items()}
    return told | {"half_width": half_width(told["tasks"], sizes)}


def _ours(config: Config, folder: Path) -> dict[str, float]:
    try:
        report = sweep.train(config, folder)
    except NonFiniteLoss:  # this rate diverges
        return dict.fromkeys(config.task_names(), 0.0)
    return {task: about["val_top1"] for task, about in report["tasks"].items()}


def _plain(config: Config, updates: int) -> dict[str, float]:
    runtime = prepare(config.runtime)
    with runtime.in_effect():
        tasks = {task: open_task(config, file) for task, file in config.task_files().items()}
        transforms = make_transforms(config, build(config, {task: len(d.class_names) for task, d in tasks.items()}))
        network, heads, _ = rivals.train(PLAIN, config, tasks, transforms, runtime, math.inf, updates)
        return {task: rivals.top1(network, heads, data, "val", transforms, runtime) for task, data in tasks.items()}


def _mean(top1: dict[str, float]) -> float:
    return sum(top1.values()) / len(top1)
