"""Format the results of `evaluate` as a text table."""

import statistics

from moe_bsr.runtime.names import printable
from moe_bsr.runtime.text_tables import as_text
from moe_bsr.runtime.top_list import are_many, shown, spread, worst_and_best

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
    """Format results by task as aligned text: one row per task, their mean, and the largest confusions.

    With many tasks, only those with the lowest and the highest top-1 have a row, and only the lowest list confusions.
    """
    top1 = {task: result["top1"] for task, result in results.items()}
    listed = shown(top1)
    rows = [COLUMNS, *(_row(task, results[task]) for task in listed)]
    if are_many(results):
        rows.append((f"({len(results) - len(listed)} between)", *[""] * (len(COLUMNS) - 1)))
        more = list(spread(top1.values()).items())[1:]
        rows += [(name, f"{value:.1f}", *[""] * (len(COLUMNS) - 2)) for name, value in more]
        confused = worst_and_best(top1)[0]
    else:
        confused = listed
    if len(results) > 1:
        rows.append(_mean_row(list(results.values())))
    lines = [as_text(rows), "", "Largest confusions (share of the class that was mistaken):"]
    for task in confused:
        pairs = [
            f"{printable(c['true'])} -> {printable(c['predicted'])} {c['count']}x ({100 * c['share']:.0f} %)"
            for c in results[task]["confusions"]
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
