"""Results of `evaluate` as a table for people."""

import statistics

from moe_bsr.runtime.names import printable
from moe_bsr.runtime.text_tables import as_text

COLUMNS = (
    "task",
    "top-1 %",
    "95 % interval",
    "top-5 %",
    "per class %",
    "ECE %",
    "chance %",
    "images",
    "images/s",
    "tokens kept",
    "experts used",
)


def table(results: dict[str, dict]) -> str:
    """Results of `evaluate` by task, as aligned text: a row each, their mean, the confusions."""
    rows = [COLUMNS, *(_row(task, result) for task, result in results.items())]
    if len(results) > 1:
        rows.append(_mean_row(list(results.values())))
    lines = [as_text(rows), "", "Largest confusions (share of the class that was mistaken):"]
    for task, result in results.items():
        pairs = [
            f"{printable(c['true'])} -> {printable(c['predicted'])} {c['count']}x ({100 * c['share']:.0f} %)"
            for c in result["confusions"]
        ]
        lines.append(f"  {task}: {', '.join(pairs) or 'none'}")
    return "\n".join(lines)


def _row(task: str, result: dict) -> tuple[str, ...]:
    experts = [len(share) for share in result["expert_share"].values()]
    used = " ".join(map(str, result["experts_used"].values()))
    return (
        task,
        f"{result['top1']:.1f}",
        f"{result['top1_low']:.1f} - {result['top1_high']:.1f}",
        *_percentages(result),
        str(result["n"]),
        f"{result['images_per_second']:.0f}",
        f"{100 * result['tokens_kept']:.1f} %",
        f"{used} of {max(experts)}" if experts else "-",
    )


def _mean_row(results: list[dict]) -> tuple[str, ...]:
    keys = ("top1", "top5", "mean_class_accuracy", "ece", "chance")
    mean = {key: statistics.fmean(result[key] for result in results) for key in keys}
    return ("mean", f"{mean['top1']:.1f}", "", *_percentages(mean), "", "", "", "")


def _percentages(result: dict) -> list[str]:
    return [f"{result[key]:.1f}" for key in ("top5", "mean_class_accuracy", "ece", "chance")]
