"""Select the tasks to show when there are too many to show all.

Up to `MANY` tasks are all shown. If there are more, the console, TensorBoard, tables and pages show the worst and the
best of them and statistics over all. The run's files have the complete list.
"""

import re
from collections.abc import Collection, Mapping
from statistics import fmean

import numpy as np

MANY = 12  # at most this many tasks are shown one by one
WORST, BEST = 10, 5  # if there are more, so many of the worst and the best are shown

MEAN, WORST_MEAN = "mean of tasks", f"mean of the worst {WORST}"


def are_many(tasks: Collection) -> bool:
    """Return whether these are too many tasks to show one by one."""
    return len(tasks) > MANY


def worst_and_best(values: Mapping[str, float], worst: int = WORST, best: int = BEST) -> tuple[list[str], list[str]]:
    """Return the names with the smallest values, ascending, and with the largest, descending. No name is in both."""
    order = sorted(values, key=lambda name: values[name])  # stable: equal values stay in the order of the tasks
    return order[:worst], order[max(worst, len(order) - best) :][::-1]


def shown(values: Mapping[str, float]) -> list[str]:
    """Return the names to show one by one: all if they are few, else the worst and then the best."""
    return [*sum(worst_and_best(values), [])] if are_many(values) else list(values)


def spread(values: Collection[float], large_is_bad: bool = False) -> dict[str, float]:
    """Return the mean of all values, the mean of the `WORST` worst, and the three quartiles.

    Args:
        large_is_bad: whether large values are the worst, as for an error.
    """
    ordered = sorted(values, reverse=large_is_bad)
    quarters = np.quantile(ordered, (0.25, 0.5, 0.75)).tolist()
    return {
        MEAN: fmean(ordered),
        WORST_MEAN: fmean(ordered[:WORST]),
        **dict(zip(("lower quartile", "median", "upper quartile"), quarters, strict=True)),
    }


def condensed(lines: list[str], tasks: Collection[str]) -> list[str]:
    """Condense lines about tasks: if there are many tasks, merge lines that differ only in task name and numbers."""
    if not are_many(tasks):
        return lines
    names = set(tasks)
    alike: dict[str, list[str]] = {}
    for line in lines:
        form = re.sub(r"[\w.-]+", lambda word: "" if word[0] in names or word[0][0].isdigit() else word[0], line)
        alike.setdefault(form, []).append(line)
    return [first if not more else f"{first} (and {len(more)} more tasks likewise)" for first, *more in alike.values()]
