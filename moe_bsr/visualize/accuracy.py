"""The section of the page about accuracy: a table of all tasks.

For many tasks it has their spread, the lowest and the highest, and a folded table of all.
"""

from moe_bsr.runtime.top_list import are_many, spread, worst_and_best
from moe_bsr.visualize.html import Section, Table


def section(scores: dict[str, tuple[int, int]]) -> Section:
    head = ["task", "top-1 %", "images"]
    rows = {task: [task, f"{100 * right / count:.1f}", str(count)] for task, (right, count) in scores.items()}
    words = [
        "Accuracy of the weights that all pictures below show, on the same images. These images also chose the "
        "checkpoint, so the numbers are a little too high. Quote those of the run's report instead.",
    ]
    if not are_many(scores):
        return Section("Accuracy", words, tables=[Table([head, *rows.values()])])
    top1 = {task: 100 * right / count for task, (right, count) in scores.items()}
    of_all = [["over all tasks", "top-1 %"], *([name, f"{value:.1f}"] for name, value in spread(top1.values()).items())]
    words.append(f"Of the {len(scores)} tasks, the lowest and the highest are listed here and drawn below.")
    worst, best = worst_and_best(top1)
    tables = [
        Table(of_all),
        Table([head, *(rows[task] for task in worst)], "the lowest"),
        Table([head, *(rows[task] for task in best)], "the highest"),
        Table([head, *(rows[task] for task in sorted(rows))], "all tasks", folded=True),
    ]
    return Section("Accuracy", words, tables=tables)
