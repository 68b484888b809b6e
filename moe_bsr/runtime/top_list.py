"""Many tasks: from how many on a few are shown for all of them, and which.

Up to `MANY` tasks everything that is shown has each of them. Of more, the console, TensorBoard, tables and pages show
a top list - the worst, and the best - and numbers over all; the whole list is in the run's files.
"""

import re
from collections.abc import Collection, Mapping
from statistics import fmean

import numpy as np

MANY = 12  # tasks at most that are shown one by one
WORST, BEST = 10, 5  # of more

MEAN, WORST_MEAN = "mean of tasks", f"mean of the worst {WORST}"


def are_many(tasks: Collection) -> bool:
    """Whether these are too many to show each of them."""
    return len(tasks) > MANY


def worst_and_best(values: Mapping[str, float], worst: int = WORST, best: int = BEST) -> tuple[list[str], list[str]]:
    """Names of the smallest values, the smallest first, and of the largest, the largest first; none is in both."""
    order = sorted(values, key=lambda name: values[name])  # equal ones in the order of the tasks
    return order[:worst], order[max(worst, len(order) - best) :][::-1]


def shown(values: Mapping[str, float]) -> list[str]:
    """The names to show one by one: all of a few, of many the worst and then the best."""
    return [*sum(worst_and_best(values), [])] if are_many(values) else list(values)


def spread(values: Collection[float], large_is_bad: bool = False) -> dict[str, float]:
    """Many tasks' values in five numbers: their mean, that of the worst ten, and the quartiles."""
    ordered = sorted(values, reverse=large_is_bad)
    quarters = np.quantile(ordered, (0.25, 0.5, 0.75)).tolist()
    return {
        MEAN: fmean(ordered),
        WORST_MEAN: fmean(ordered[:WORST]),
        **dict(zip(("lower quartile", "median", "upper quartile"), quarters, strict=True)),
    }


def condensed(lines: list[str], tasks: Collection[str]) -> list[str]:
    """Lines about tasks; of many tasks, one for those that differ in the task's name and numbers alone."""
    if not are_many(tasks):
        return lines
    names = set(tasks)
    alike: dict[str, list[str]] = {}
    for line in lines:
        form = re.sub(r"[\w.-]+", lambda word: "" if word[0] in names or word[0][0].isdigit() else word[0], line)
        alike.setdefault(form, []).append(line)
    return [first if not more else f"{first} (and {len(more)} more tasks alike)" for first, *more in alike.values()]
