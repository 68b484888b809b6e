"""Write a run's row in TensorBoard's HParams tab: its settings, and its results on the validation split.

The tab's three messages go through the run's own writer, because `SummaryWriter.add_hparams` would create a second,
time-stamped run.
"""

from collections.abc import Mapping
from typing import Any

from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from moe_bsr.callbacks.writer import Writer
from moe_bsr.config import Config
from moe_bsr.runtime.names import printable
from moe_bsr.runtime.top_list import are_many

SECTION = "with what result"  # section of the scalars; sorted after all others


def write(writer: Writer, config: Config, report: Mapping[str, Any], top1: Mapping[str, float]) -> None:
    """Add the row of a finished run.

    Args:
        report: as `runs.report.make` returns it.
        top1: validation top-1 of the selected weights in percent, by task.
    """
    results, step = outcomes(report, top1), report["selected_step"]
    columns, *messages = hparams(choices(config, report), {f"{SECTION}/{name}": 0.0 for name in results})
    _name_columns(columns)
    for message in (columns, *messages):
        writer.add(message, step)
    for name, value in results.items():
        writer.scalar(f"{SECTION}/{name}", value, step)


def choices(config: Config, report: Mapping[str, Any]) -> dict[str, str | float]:
    """Return the settings that distinguish runs, by column. Lists become text, because the tab has no list type.

    TensorBoard sorts the columns by name and shows five at first. The names are chosen so that the plan is among them.
    """
    plan, moe, data = config.plan, config.moe, config.data
    keeps = plan.keep_rate if isinstance(plan.keep_rate, list) else [plan.keep_rate] * bool(plan.drop_blocks)
    trained = plan.train_blocks if plan.train_blocks == "all" else _listed(plan.train_blocks)
    found = {
        "with adapter": _listed_parts(config.adapter),
        "images augmented": "cropped and mirrored" if data.augment else "no",
        "backbone": f"{config.backbone.name} ({config.backbone.weights})",
        "blocks trained": trained if plan.train_weights == "all" else f"{trained} ({plan.train_weights})",
        "drop in blocks": _listed(plan.drop_blocks),
        "drop keeps": _listed(keeps) + " (merged)" * config.tokens.merges,
        "expert blocks": _listed(plan.moe_blocks),
        "experts": moe.words.replace("top-", "top ") if plan.moe_blocks else "none",
        "images per batch": float(config.train.batch_size),
        "learning rate": config.train.lr,
        "load balance": moe.balance_loss if plan.moe_blocks else "none",
        "precision": report["environment"]["precision"],
        "router": moe.router if plan.moe_blocks else "none",
        "sampler": config.sampler.kind,
        "seed": float(config.seed),
        "steps": float(config.train.steps),
        "storage": _listed_parts(config.storage),
        "tasks": _tasks(config.task_names()),
    }
    return {name: printable(value) if isinstance(value, str) else value for name, value in found.items()}


def outcomes(report: Mapping[str, Any], top1: Mapping[str, float]) -> dict[str, float]:
    """Return the results by column; the tab shows the first five. No test scores: runs are selected by validation."""
    results = {
        "mean val top-1 %": report["selected_mean_val_top1"],
        "peak MB": report["measured_peak_mb"],
        "GFLOPs per image": report["gflops_per_image"],
        "train seconds": report["train_seconds"],
    } | {f"{task} val top-1 %": value for task, value in top1.items()}
    return {name: value for name, value in results.items() if value is not None}  # the predicted cost may be unknown


def _name_columns(message: Any) -> None:
    """Set the display name of each result to its tag without the section."""
    content = message.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(content.content)
    for metric in data.experiment.metric_infos:
        metric.display_name = metric.name.tag.removeprefix(f"{SECTION}/")
    content.content = data.SerializeToString()


def _listed_parts(parts: str | dict[str, Any] | list | None) -> str:
    """Format storages or adapters as the configuration names them: "recompute 3, 4; int8 5"."""
    each = parts if isinstance(parts, list) else [parts]
    return "; ".join("none" if part is None else _described(part) for part in each)


def _described(part: str | dict[str, Any]) -> str:
    """Format a kind, its options and its blocks: "recompute 3, 4"."""
    if isinstance(part, str):
        return part
    options = [f"{key}={value}" for key, value in part.items() if key not in ("kind", "blocks")]
    blocks = [_listed(part["blocks"])] if "blocks" in part else []
    return " ".join([part["kind"], *options, *blocks])


def _tasks(names: list[str]) -> str:
    return f"{len(names)}: {names[0]} to {names[-1]}" if are_many(names) else ", ".join(names)


def _listed(values: list) -> str:
    return ", ".join(map(str, values)) or "none"
