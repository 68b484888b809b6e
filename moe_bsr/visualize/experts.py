"""Draw routing statistics and ablations: tasks x experts, tasks x tasks, blocks x experts.

All pictures are tables of colored cells. Shares have one color scale, from 0 to four times the uniform level, which is
the same at every step. So pictures of different blocks and times can be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.visualize import cells, theme
from moe_bsr.visualize.cells import BAR_GAP, BAR_ROOM, GAP, MARGIN, TITLE, WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_bsr.evaluation.ablation import Ablation

ROW, LOW_ROW = 38, 23  # height of a row with and without numbers
MAX_CELL = 64  # largest width of a cell
MAX_NUMBERED = (10, 16)  # tasks and experts up to which cells have numbers
SCALE_END = 4  # end of the scale of shares, as a multiple of the uniform level
MIN_SCALE = 5.0  # the scale of lost points ends here or higher, so that noise does not get full color


def has_room_for_numbers(tasks: int, experts: int) -> bool:
    """Return whether cells have room for numbers. If not, a table should stand beside the picture."""
    return tasks <= MAX_NUMBERED[0] and experts <= MAX_NUMBERED[1]


def heatmap(statistics: RoutingStatistics, block: int, split: str, step: int | None = None) -> Figure:
    """Draw task x expert: share of the choices and share of the gate weight. Rows sum to 1.

    Args:
        split: which tokens were counted, such as "training since step 20" or "validation".
        step: of the weights; None to leave it out.
    """
    tasks, experts = statistics.tasks, statistics.experts
    numbers = has_room_for_numbers(len(tasks), experts)
    beside = experts <= MAX_NUMBERED[1] // 2
    row = ROW if numbers else LOW_ROW
    left = MARGIN + cells.label_width(tasks)
    width = (WIDTH - left - MARGIN - GAP) / 2 if beside else WIDTH - left - MARGIN
    column = min(MAX_CELL, width / experts)
    panel = 60 + row * len(tasks) + 14
    figure, axes = theme.canvas(WIDTH, round(TITLE + panel * (2 - beside) - 14 + BAR_ROOM))
    cells.title(axes, f"Block {block}: experts used by each task", cells.subtitle(split, step))
    for number, (of, words) in enumerate({"count": "choices", "gate": "gate weight"}.items()):
        shares = statistics.shares(of)
        x = left + (width + GAP) * number * beside
        y = TITLE + panel * number * (not beside) + 60
        theme.text(axes, x, y - 44, f"share of {words}, %", weight="bold")
        cells.column_labels(axes, x, y, column, experts)
        cells.cells(
            axes,
            x,
            y,
            column,
            row,
            shares * experts / _scale_end(experts),
            [[f"{100 * v:.0f}" for v in r] for r in shares] if numbers else None,
        )
        if number == 0 or not beside:
            cells.row_labels(axes, x, y, row, tasks)
        for index in np.flatnonzero(~statistics.seen):
            theme.text(
                axes, x + 8, y + (index + 0.5) * row, "no data", size=theme.SMALL if numbers else 14, color=theme.MUTED
            )
    cells.color_bar(axes, y + row * len(tasks) + BAR_GAP, 1 / experts, _scale_end(experts) / experts, left)
    return figure


def distances(statistics: RoutingStatistics, block: int, split: str, step: int | None = None) -> Figure:
    """Draw task x task: Jensen-Shannon distance between the tasks' shares of choices."""
    tasks, apart = statistics.tasks, statistics.distances()
    numbers = len(tasks) <= MAX_NUMBERED[0]
    left = MARGIN + cells.label_width(tasks)
    cell = min(1.25 * MAX_CELL, (WIDTH - left - MARGIN - 80) / len(tasks))
    top = TITLE + 40 + cells.slanted_height(tasks, cell)
    figure, axes = theme.canvas(WIDTH, round(top + cell * len(tasks) + BAR_ROOM))
    cells.title(axes, f"Block {block}: how far apart tasks route", cells.subtitle(split, step))
    theme.text(axes, MARGIN, TITLE + 12, "Jensen-Shannon distance of their shares of choices")
    cells.cells(axes, left, top, cell, cell, apart, [[f"{v:.2f}" for v in r] for r in apart] if numbers else None)
    cells.row_labels(axes, left, top, cell, tasks)
    cells.slanted_labels(axes, left, top, cell, tasks)
    cells.color_bar(
        axes, top + cell * len(tasks) + BAR_GAP, None, 1.0, left, "0: same use of experts", "1: no common expert"
    )
    return figure


def overview(by_block: dict[int, RoutingStatistics], split: str = "validation", step: int | None = None) -> Figure:
    """Draw block x expert: share of all choices, with equal weight for each task, and each block's numbers."""
    experts = max(s.experts for s in by_block.values())
    left, right = MARGIN + 92, 3 * 82
    column = min(MAX_CELL, (WIDTH - left - right - MARGIN) / experts)
    top = TITLE + 62
    figure, axes = theme.canvas(WIDTH, round(top + ROW * len(by_block) + BAR_ROOM))
    cells.title(axes, "All blocks: load of each expert", cells.subtitle(split, step))
    shares = np.array([_mean_of_seen(s.shares("count")) for s in by_block.values()])
    cells.column_labels(axes, left, top, column, experts)
    cells.cells(
        axes,
        left,
        top,
        column,
        ROW,
        shares * experts / _scale_end(experts),
        [[f"{100 * v:.0f}" for v in r] for r in shares] if column >= 24 else None,
    )
    cells.row_labels(axes, left, top, ROW, [f"block {block}" for block in by_block])
    for place, (name, words) in enumerate(
        (
            ("load_cv", ("load", "CV")),
            ("dead_experts", ("dead", "experts")),
            ("mutual_information", ("special-", "ization")),
        )
    ):
        x = left + column * experts + 82 * (place + 1)
        for line, word in enumerate(words):
            theme.text(axes, x, top - 46 + 20 * line, word, ha="right", color=theme.MUTED)
        for number, s in enumerate(by_block.values()):
            value = s.numbers()[name]
            shown = "-" if np.isnan(value) else f"{value:.0f}" if name == "dead_experts" else f"{value:.2f}"
            theme.text(axes, x, top + (number + 0.5) * ROW, shown, ha="right")
    cells.color_bar(axes, top + ROW * len(by_block) + BAR_GAP, 1 / experts, _scale_end(experts) / experts, left)
    return figure


def ablation(result: Ablation, block: int, split: str, step: int | None = None) -> Figure:
    """Draw task x expert: percentage points of accuracy lost when the expert is masked."""
    points, (tasks, experts) = result.points(), result.lost.shape
    numbers = has_room_for_numbers(tasks, experts)
    left, top, row = MARGIN + 130, TITLE + 30, 44 if tasks <= MAX_NUMBERED[0] else 26
    column, bottom = (WIDTH - MARGIN - left) / experts, top + row * tasks
    figure, axes = theme.canvas(WIDTH, bottom + 46)
    cells.title(
        axes,
        f"Block {block}: accuracy lost without one expert",
        f"percentage points; {cells.subtitle(split, step)}, {result.images.max()} images a task",
    )
    cells.column_labels(axes, left, top, column, experts)
    cells.row_labels(axes, left, top, row, result.tasks)
    cells.cells(
        axes,
        left,
        top,
        column,
        row,
        points / max(np.abs(points).max(), MIN_SCALE),
        [[f"{v:.{int(abs(v) < 9.95)}f}" for v in r] for r in points] if numbers else None,
        theme.diverging,
        theme.TINY + 1,
        result.clear(),
    )
    words = f"blue: loss, up to {max(0, points.max()):.1f}; brown: gain, up to {max(0, -points.min()):.1f}"
    theme.text(
        axes, WIDTH - MARGIN, bottom + 24, words + "; bold: more than chance" * numbers, color=theme.MUTED, ha="right"
    )
    return figure


def _scale_end(experts: int) -> float:
    """Return the end of the scale of shares, as a multiple of the uniform level."""
    return min(SCALE_END, experts)


def _mean_of_seen(shares: np.ndarray) -> np.ndarray:
    seen = ~np.isnan(shares[:, 0])
    return shares[seen].mean(0) if seen.any() else shares[0]
