"""Compose the lines that a user sees when a run starts."""

from pathlib import Path

from moe_bsr.config import Config
from moe_bsr.data import TaskData
from moe_bsr.data.splits import SPLITS
from moe_bsr.model import summary
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.device import Runtime
from moe_bsr.runtime.top_list import are_many
from moe_bsr.training import length
from moe_bsr.training.doubts import doubts


def about(
    config: Config, model: MultitaskViT, tasks: dict[str, TaskData], runtime: Runtime, run_dir: Path, cost: str
) -> list[str]:
    """Return the lines that describe a run.

    Args:
        cost: one line with its predicted cost.
    """
    counts = {name: len(data.train) for name, data in tasks.items()}
    return [
        *summary.summary(model, config),
        f"train/val/test images: {_sizes(tasks)}",
        *(f"warning: {doubt}" for doubt in doubts(config, counts)),
        f"{_length(config, counts)}; {runtime.precision} ({runtime.precision_reason}), {runtime.threads} threads on "
        f"{runtime.device}; run folder {run_dir}",
        *runtime.ranks.about(),
        cost,
    ]


def _sizes(tasks: dict[str, TaskData]) -> str:
    each = {n: f"{len(d.train)}/{len(d.val)}/{len(d.test)}" for n, d in tasks.items()}
    if not are_many(tasks):
        return ", ".join(f"{name} {size}" for name, size in each.items())
    totals = (sum(len(getattr(data, split)) for data in tasks.values()) for split in SPLITS)
    order = sorted(tasks, key=lambda name: len(tasks[name].train))
    return (
        f"{'/'.join(map(str, totals))} in {len(tasks)} tasks, from {order[0]} {each[order[0]]} to {order[-1]} "
        f"{each[order[-1]]}"
    )


def _length(config: Config, sizes: dict[str, int]) -> str:
    if config.train.optimizer == "lbfgs":
        return f"only the heads, by L-BFGS on features computed once ({config.train.penalty} penalty)"
    return f"{length.described(config, sizes)} of {config.train.batch_size} images ({config.sampler.kind})"
