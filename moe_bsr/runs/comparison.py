"""Finished runs side by side, from their reports."""

from typing import Any


def comparison(reports: dict[str, dict[str, Any]], intervals: bool) -> list[list[str]]:
    """Rows of a table of runs: a header, chance, then one row per run."""
    names = list(dict.fromkeys(task for report in reports.values() for task in report["tasks"]))
    rows = [["top-1 %", *names, "mean", "images/task", "train s", "peak MB", "GFLOPs"]]
    first = next(iter(reports.values()))["tasks"]
    rows.append(
        [
            "chance",
            *(f"{first[n]['chance']:.1f}" if "chance" in first.get(n, {}) else "-" for n in names),
            "",
            "",
            "",
            "",
            "",
        ]
    )
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
                run,
                *cells,
                "-" if mean is None else f"{mean:.2f}",
                str(images[0]) if len(images) == 1 else f"{images[0]}-{images[-1]}",
                f"{report['train_seconds']:.0f}",
                f"{report['measured_peak_mb']:.0f}",
                "-" if report["gflops_per_image"] is None else f"{report['gflops_per_image']:.2f}",
            ]
        )
    return rows


def expert_use(report: dict[str, Any]) -> str:
    """Share of each expert among a task's choices in training, in percent, by block."""
    lines = []
    for block, tasks in report.get("expert_use", {}).items():
        lines.append(f"\nblock {block}: share of each expert in % of the task's choices (training)")
        width = max(map(len, tasks))
        lines += [
            f"  {task:<{width}} " + " ".join(f"{100 * share:4.0f}" for share in shares)
            for task, shares in tasks.items()
        ]
    return "\n".join(lines)
