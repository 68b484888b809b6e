"""Compare token-dropping settings before training: accuracy of a linear probe against FLOPs.

Training recovers a part of the accuracy that dropping costs. The less a setting loses at the start, the less there is
to recover. Settings are therefore compared by linear probes on the pretrained backbone's features, all with the same
validation images.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from moe_bsr.benchmark.drop_settings import DropSetting, features_of_settings, relative_flops
from moe_bsr.config import Config
from moe_bsr.config.probe import probe_config
from moe_bsr.data import TaskData
from moe_bsr.evaluation.features import Features, split_features
from moe_bsr.evaluation.metrics import NORMAL_975
from moe_bsr.model.multitask import MultitaskViT, build
from moe_bsr.runs import folder as run
from moe_bsr.runtime.device import Runtime
from moe_bsr.runtime.rng import key, stream
from moe_bsr.training.linear_probe import fit

SAME = 1.01  # largest ratio of FLOPs that counts as equal


@dataclass(frozen=True)
class Row:
    """Result of one setting.

    Attributes:
        flops: FLOPs of the blocks relative to those without dropping.
        top1: validation accuracy of the probe by task, percent.
        lost: percentage points lost compared with no dropping, mean over the tasks.
        error: half-width of the 95 % interval of `lost`, from the paired differences between images.
    """

    setting: DropSetting
    flops: float
    top1: dict[str, float]
    lost: float
    error: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "setting": str(self.setting),
            "overrides": self.setting.overrides(),
            "relative_flops": self.flops,
            "val_top1": self.top1,
            "mean": fmean(self.top1.values()),
            "lost": self.lost,
            "error": self.error,
        }


def frozen(config: Config) -> Config:
    """Return the configuration of the shared backbone: nothing trains and nothing is dropped."""
    probe = probe_config(config)
    return replace(probe, plan=replace(probe.plan, drop_blocks=[], keep_rate=1.0))


def study(
    config: Config,
    runtime: Runtime,
    settings: list[DropSetting],
    images: int,
    on_task: Callable[[str, int, int], None] = lambda task, train, val: None,
) -> list[Row]:
    """Return a row for each setting.

    Args:
        config: as returned by `frozen`. settings: the first one must drop nothing.
        images: the most training images per task; half as many are used for validation.
        on_task: called with each task's name and numbers of training and validation images before its probes.
    """
    right: dict[DropSetting, dict[str, Tensor]] = {setting: {} for setting in settings}
    for name, file in config.task_files().items():
        data = run.open_task(config, file)
        data = _some(_some(data, "train", images), "val", images // 2)
        on_task(name, len(data.train), len(data.val))
        model = runtime.place(build(config, {name: len(data.class_names)})).eval()
        flops = {setting: relative_flops(model, setting) for setting in settings}
        for setting, found in _right(config, runtime, model, data, settings).items():
            right[setting][name] = found
    return [_row(setting, flops[setting], right[setting], right[settings[0]]) for setting in settings]


def _some(data: TaskData, split: str, count: int) -> TaskData:
    """Return the task with a fixed random subset of a split, with at most `count` images."""
    places = stream(key(0, data.name, "drops", split)).permutation(len(getattr(data, split)))[:count]
    return data.select(split, places)


def _right(
    config: Config, runtime: Runtime, model: MultitaskViT, data: TaskData, settings: list[DropSetting]
) -> dict[DropSetting, Tensor]:
    """Return, for each setting, which validation images its probe classifies correctly: (N,) float64 of 0 and 1."""

    def make(images: Tensor) -> Tensor:
        made = features_of_settings(model, images, settings)
        return torch.stack([made[setting] for setting in settings], 1)

    transforms = run.make_transforms(config, model)
    train, val = (
        split_features(make, data, split, transforms, runtime, config.train.batch_size) for split in ("train", "val")
    )
    found = {}
    for place, setting in enumerate(settings):
        of_train, of_val = (Features(each.x[:, place].contiguous(), each.labels) for each in (train, val))
        probe = fit(of_train, of_val, len(data.class_names))
        logits = of_val.x @ probe.weight.T + probe.bias
        found[setting] = (logits.argmax(1) == of_val.labels).double()
    return found


def _row(setting: DropSetting, flops: float, right: dict[str, Tensor], whole: dict[str, Tensor]) -> Row:
    lost = {task: whole[task] - right[task] for task in right}
    variance = sum(float(each.var(correction=0)) / len(each) for each in lost.values()) / len(lost) ** 2
    return Row(
        setting,
        flops,
        {task: 100 * float(each.mean()) for task, each in right.items()},
        100 * fmean(float(each.mean()) for each in lost.values()),
        100 * NORMAL_975 * variance**0.5,
    )


def cheapest_loss(rows: list[Row], own: DropSetting) -> Row:
    """Return the row that loses least among those with no more FLOPs than the setting `own`."""
    limit = SAME * next(row.flops for row in rows if row.setting == own)
    return min((row for row in rows if row.flops <= limit), key=lambda row: row.lost)


def on_the_front(rows: list[Row]) -> list[Row]:
    """Return the rows on the Pareto front of accuracy and FLOPs."""
    return [row for row in rows if not any(_beats(other, row) for other in rows)]


def _beats(one: Row, other: Row) -> bool:
    no_worse = one.lost <= other.lost and one.flops <= other.flops
    return no_worse and (one.lost < other.lost or one.flops < other.flops)
