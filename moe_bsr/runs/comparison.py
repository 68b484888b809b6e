"""Tables that compare finished runs, made from their reports."""

from typing import Any

from moe_bsr.runtime.top_list import WORST, are_many, spread, worst_and_best


def comparison(reports: dict[str, dict[str, Any]], intervals: bool) -> list[list[str]]:
    """Return the rows of a table: a header, a row of chance accuracies, then one row per run.

    If there are many tasks, columns of statistics over all tasks replace the column of each task. A run that was not
    scored on the test split has the split in its name.

    Args:
        reports: by run.
        intervals: whether to show 95 % confidence intervals.
    """
    names = list(dict.fromkeys(task for report in reports.values() for task in report["tasks"]))
    if are_many(names):
        return _spreads(reports)
    rows = [["top-1 %", *names, "mean", "images/task", "train s", "peak MB", "GFLOPs"]]
    chance = _chance(list(reports.values()))
    rows.append(["chance", *(f"{chance[name]:.1f}" if name in chance else "-" for name in names), *[""] * 5])
    for run, report in reports.items():
        cells = []
        for name in names:
            task = report["tasks"].get(name, {})
            interval = f" [{task['top1_low']:.1f}, {task['top1_high']:.1f}]" if intervals and "top1" in task else ""
            cells.append(f"{task['top1']:.1f}{interval}" if "top1" in task else "-")
        images = sorted({task["images"] for task in report["tasks"].values()})
        mean = report["mean_top1"]
        rows.append(
            [
                _named(run, report),
                *cells,
                "-" if mean is None else f"{mean:.2f}",
                str(images[0]) if len(images) == 1 else f"{images[0]}-{images[-1]}",
                f"{report['train_seconds']:.0f}",
                f"{report['measured_peak_mb']:.0f}",
                "-" if report["gflops_per_image"] is None else f"{report['gflops_per_image']:.2f}",
            ]
        )
    return rows


def _chance(reports: list[dict[str, Any]]) -> dict[str, float]:
    """Return each task's chance accuracy on the split of the first run, from the first run that has it."""
    same = [report["tasks"] for report in reports if _split(report) == _split(reports[0])]
    return {name: task["chance"] for tasks in same[::-1] for name, task in tasks.items() if "chance" in task}


def _split(report: dict[str, Any]) -> str:
    return report.get("split", "test")


def _named(run: str, report: dict[str, Any]) -> str:
    split = _split(report)
    return run if split == "test" else f"{run} ({split} split)"


def _spreads(reports: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for run, report in reports.items():
        known = [task["top1"] for task in report["tasks"].values() if "top1" in task]
        numbers = {name: f"{value:.2f}" for name, value in spread(known or [float("nan")]).items()}
        rows.append(
            [_named(run, report), str(len(report["tasks"])), *numbers.values(), f"{report['train_seconds']:.0f}"]
        )
    return [["top-1 %", "tasks", *numbers, "train s"], *rows]


def most_changed(reports: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return rows of the tasks whose accuracy changed most from the first run to the last: worse ones, then better.

    Empty unless there are at least two runs with many tasks in common.
    """
    runs = list(reports.values())
    top1 = [{name: task["top1"] for name, task in run["tasks"].items() if "top1" in task} for run in runs]
    change = {name: top1[-1][name] - value for name, value in top1[0].items() if name in top1[-1]}
    if len(runs) < 2 or not are_many(change):
        return []
    worse, better = worst_and_best(change, best=WORST)
    rows = [["most changed, top-1 %", *reports, "last - first"]]
    for name in [*(n for n in worse if change[n] < 0), *(n for n in better[::-1] if change[n] > 0)]:
        rows.append([name, *(f"{of[name]:.1f}" if name in of else "-" for of in top1), f"{change[name]:+.1f}"])
    return rows if len(rows) > 1 else []


def expert_use(report: dict[str, Any]) -> str:
    """Return a text with each expert's share of a task's routing choices during training, in percent, by block."""
    lines = []
    for block, tasks in report.get("expert_use", {}).items():
        lines.append(f"\nblock {block}: share of each expert in % of the task's choices (training)")
        width = max(map(len, tasks))
        lines += [
            f"  {task:<{width}} " + " ".join(f"{100 * share:4.0f}" for share in shares)
            for task, shares in tasks.items()
        ]
    return "\n".join(lines)
