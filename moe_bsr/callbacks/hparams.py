"""A run's row in TensorBoard's HParams tab: what was chosen, and what came of it.

The three messages of the tab go through the run's own writer. (`SummaryWriter.add_hparams` would open a
second, time-stamped run beside it.)
"""

from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from moe_bsr.config import Config


def write(writer: SummaryWriter, config: Config, report: Mapping[str, Any]) -> None:
    """Add the row of a finished run; nothing for one that was interrupted and has no result yet.

    Args:
        report: as `runs.report.make` returns it.
    """
    if report["mean_top1"] is None:
        return
    results = outcomes(report)
    for message in hparams(choices(config), results):
        writer.file_writer.add_summary(message)
    for tag, value in results.items():
        writer.add_scalar(tag, value, report["step"])


def choices(config: Config) -> dict[str, str | float]:
    """The columns by which runs are told apart; lists as text, because the tab knows no lists.

    TensorBoard sorts columns by name and shows five at first: the names put the plan there.
    """
    plan, moe, storage = config.plan, config.moe, config.storage
    keeps = plan.keep_rate if isinstance(plan.keep_rate, list) else [plan.keep_rate] * bool(plan.drop_blocks)
    return {
        "blocks trained": plan.train_blocks if plan.train_blocks == "all" else _listed(plan.train_blocks),
        "drop in blocks": _listed(plan.drop_blocks),
        "drop keeps": _listed(keeps),
        "expert blocks": _listed(plan.moe_blocks),
        "experts": f"top {moe.top_k} of {moe.num_experts}" if plan.moe_blocks else "none",
        "images per batch": float(config.train.batch_size),
        "learning rate": config.train.lr,
        "load balance": moe.balance_loss if plan.moe_blocks else "none",
        "router": moe.router if plan.moe_blocks else "none",
        "sampler": config.sampler.kind,
        "seed": float(config.seed),
        "steps": float(config.train.steps),
        "storage": "; ".join(map(_described, storage if isinstance(storage, list) else [storage])),
        "tasks": ", ".join(config.task_names()),
    }


def outcomes(report: Mapping[str, Any]) -> dict[str, float]:
    """The tab's results, by scalar tag, the first five shown; accuracies on the report's split."""
    results = {
        "result/mean top-1 %": report["mean_top1"],
        "result/peak MB": report["measured_peak_mb"],
        "result/GFLOPs per image": report["gflops_per_image"],
        "result/train seconds": report["train_seconds"],
    } | {f"result/{task} top-1 %": scores["top1"] for task, scores in report["tasks"].items()}
    return {tag: value for tag, value in results.items() if value is not None}  # the cost may be unknown


def _described(storage: str | dict[str, Any]) -> str:
    """A storage, its options and its blocks, as the configuration names them: "recompute 3, 4"."""
    if isinstance(storage, str):
        return storage
    options = [f"{key}={value}" for key, value in storage.items() if key not in ("kind", "blocks")]
    blocks = [_listed(storage["blocks"])] if "blocks" in storage else []
    return " ".join([storage["kind"], *options, *blocks])


def _listed(values: list) -> str:
    return ", ".join(map(str, values)) or "none"
