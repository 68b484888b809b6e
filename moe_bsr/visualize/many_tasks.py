"""Draw the routing of many tasks in one picture: the ten that stand out with their names, and all as thin lines.

Lines are sorted by the expert that a task uses most. So tasks that route alike are next to each other, and the number
of tasks in each group is written beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.evaluation.routing import RoutingStatistics, entropy_bits
from moe_bsr.runtime.top_list import WORST, are_many
from moe_bsr.visualize import cells, experts, theme
from moe_bsr.visualize.cells import BAR_GAP, BAR_ROOM, MARGIN, TITLE, WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW = 28  # height of a row with a name
LINES = 640  # largest height of all thin lines together
LEAST, MOST = 1, 10  # height of one of them
LABEL_ROOM = 20  # smallest distance of two labels beside them


def heatmap(statistics: RoutingStatistics, block: int, split: str, step: int | None = None) -> Figure:
    """Draw task x expert: share of the choices. Rows sum to 1. Few tasks are drawn by `experts.heatmap`."""
    if not are_many(statistics.tasks):
        return experts.heatmap(statistics, block, split, step)
    tasks, count, shares = statistics.tasks, statistics.experts, statistics.shares("count")
    order, apart = sorted_rows(shares), outstanding(shares)
    names = [tasks[row] for row in apart]
    line = float(np.clip(LINES / len(tasks), LEAST, MOST))
    left = MARGIN + max(150, cells.label_width(names or [""]))
    column = (WIDTH - left - MARGIN) / count
    first = TITLE + 60
    second = first + ROW * len(apart) + 90
    bottom = second + line * len(tasks)
    figure, axes = theme.canvas(WIDTH, round(bottom + BAR_ROOM))
    cells.title(axes, f"Block {block}: experts used by {len(tasks)} tasks", cells.subtitle(split, step))
    end = experts.SCALE_END if count > experts.SCALE_END else count
    theme.text(axes, left, first - 44, f"the {len(apart)} least like the others, share of choices, %", weight="bold")
    cells.column_labels(axes, left, first, column, count)
    numbers = [[f"{100 * v:.0f}" for v in shares[row]] for row in apart] if column >= 24 else None
    cells.cells(axes, left, first, column, ROW, shares[apart] * count / end, numbers)
    cells.row_labels(axes, left, first, ROW, names)
    theme.text(axes, left, second - 44, "all, a line each, sorted by the expert each uses most", weight="bold")
    cells.column_labels(axes, left, second, column, count)
    axes.imshow(
        theme.sequential(shares[order] * count / end),
        extent=(left, left + column * count, bottom, second),
        interpolation="nearest",
        aspect="auto",
        zorder=1,
    )
    right = left + column * count
    axes.plot([left, right, right, left, left], [second, second, bottom, bottom, second], color=theme.FAINT, zorder=3)
    theme.text(axes, left - 12, second - 14, "tasks: expert", ha="right", size=cells.NUMBER, color=theme.MUTED)
    labeled: list[float] = []
    for label, start, stop in sorted(groups(shares[order]), key=lambda group: group[1] - group[2]):  # large ones first
        top, middle = second + line * start, second + line * (start + stop) / 2
        if start:
            axes.plot([left - 8, right], [top, top], color=theme.MUTED, linewidth=0.8, zorder=3)
        if all(abs(middle - other) >= LABEL_ROOM for other in [*labeled, second - 8]):
            words = f"{stop - start}: {'no data' if label < 0 else label}"
            theme.text(axes, left - 12, middle, words, ha="right")
            labeled.append(middle)
    cells.color_bar(axes, bottom + BAR_GAP, 1 / count, end / count, left)
    return figure


def sorted_rows(shares: np.ndarray) -> np.ndarray:
    """Return the order (T,) of rows by the expert that each uses most, then by its share; rows of NaN come last."""
    seen = ~np.isnan(shares[:, 0])
    filled = np.nan_to_num(shares)
    return np.lexsort((-filled.max(1), np.where(seen, filled.argmax(1), shares.shape[1])))


def outstanding(shares: np.ndarray) -> list[int]:
    """Return the ten rows, or fewer, whose Jensen-Shannon divergence from the mean of all is largest, largest first."""
    seen = np.flatnonzero(~np.isnan(shares[:, 0]))
    if not len(seen):
        return []
    rows, mean = shares[seen], shares[seen].mean(0)
    apart = entropy_bits((rows + mean) / 2) - (entropy_bits(rows) + entropy_bits(mean)) / 2
    return seen[np.argsort(-apart, kind="stable")[:WORST]].tolist()


def groups(ordered: np.ndarray) -> list[tuple[int, int, int]]:
    """Group sorted rows by their most used expert: (expert, first row, row after the last); expert -1 is no data."""
    best = [-1 if np.isnan(row[0]) else int(row.argmax()) for row in ordered]
    starts = [i for i, label in enumerate(best) if i == 0 or label != best[i - 1]]
    return [(best[i], i, j) for i, j in zip(starts, [*starts[1:], len(best)], strict=True)]
