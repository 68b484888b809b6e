"""Pictures of routing statistics and ablations: tasks x experts, experts x experts, tasks x tasks, blocks x experts.

All are tables of colored cells. Shares are colored on one scale, from 0 to four times the uniform
level and the same at every step, so that pictures of different blocks and times can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.visualize import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_bsr.evaluation.ablation import Ablation

WIDTH, MARGIN, GAP = theme.WIDTH, 18, 28
TITLE = 78  # pixels of heading and subtitle
ROW, LOW_ROW = 38, 23  # height of a row with and without numbers
MAX_CELL = 64  # width of a cell
BAR_GAP, BAR_ROOM = 42, 110  # pixels from the cells to the color bar, and to the end of the paper
MAX_NUMBERED = (10, 16)  # tasks and experts up to which cells carry numbers
NUMBER = 15  # font size of the experts' numbers
MAX_LETTERS = 13  # letters of a task's name
SCALE_END = 4  # times the uniform level: the end of the scale of shares
MIN_SCALE = 5.0  # points lost that get full color at the least: noise should look like noise


def has_room_for_numbers(tasks: int, experts: int) -> bool:
    """Whether cells have room for numbers; where not, a table belongs beside the picture."""
    return tasks <= MAX_NUMBERED[0] and experts <= MAX_NUMBERED[1]


def heatmap(statistics: RoutingStatistics, block: int, split: str, step: int | None = None) -> Figure:
    """Task x expert: share of the choices and share of the gate weight; rows sum to 1.

    Args:
        split: which tokens were counted, such as "training since step 20" or "validation".
    """
    tasks, experts = statistics.tasks, statistics.experts
    numbers = has_room_for_numbers(len(tasks), experts)
    beside = experts <= MAX_NUMBERED[1] // 2
    row = ROW if numbers else LOW_ROW
    left = MARGIN + _label_width(tasks)
    width = (WIDTH - left - MARGIN - GAP) / 2 if beside else WIDTH - left - MARGIN
    column = min(MAX_CELL, width / experts)
    panel = 60 + row * len(tasks) + 14
    figure, axes = theme.canvas(WIDTH, round(TITLE + panel * (2 - beside) - 14 + BAR_ROOM))
    _title(axes, f"Block {block}: experts used by each task", _subtitle(split, step))
    for number, (of, words) in enumerate({"count": "choices", "gate": "gate weight"}.items()):
        shares = statistics.shares(of)
        x = left + (width + GAP) * number * beside
        y = TITLE + panel * number * (not beside) + 60
        theme.text(axes, x, y - 44, f"share of {words}, %", weight="bold")
        _column_labels(axes, x, y, column, experts)
        _cells(
            axes,
            x,
            y,
            column,
            row,
            shares * experts / _scale_end(experts),
            [[f"{100 * v:.0f}" for v in r] for r in shares] if numbers else None,
        )
        if number == 0 or not beside:
            _row_labels(axes, x, y, row, tasks)
        for index in np.flatnonzero(~statistics.seen):
            theme.text(
                axes, x + 8, y + (index + 0.5) * row, "no data", size=theme.SMALL if numbers else 14, color=theme.MUTED
            )
    _color_bar(axes, y + row * len(tasks) + BAR_GAP, 1 / experts, _scale_end(experts) / experts, left)
    return figure


def coactivation(statistics: RoutingStatistics, block: int, split: str, step: int | None = None) -> Figure:
    """Expert x expert: of the tokens that chose the row's, the share that also chose the column's."""
    experts, shares = statistics.experts, statistics.together()
    chosen = statistics.top_k
    left = MARGIN + 46
    cell = min(MAX_CELL, (WIDTH - left - MARGIN) / experts)
    top = TITLE + 64
    figure, axes = theme.canvas(WIDTH, round(top + cell * experts + BAR_ROOM))
    _title(axes, f"Block {block}: experts chosen together", _subtitle(split, step))
    theme.text(axes, MARGIN, TITLE + 12, "% of the row's tokens that also chose the column's expert")
    _column_labels(axes, left, top, cell, experts)
    _cells(
        axes,
        left,
        top,
        cell,
        cell,
        shares / _coactivation_scale(chosen, experts)[1],
        [[f"{100 * v:.0f}" for v in r] for r in shares] if experts <= MAX_NUMBERED[1] else None,
    )
    every = _label_interval(cell)
    _row_labels(axes, left, top, cell, [str(i) if i % every == 0 else "" for i in range(experts)], NUMBER)
    if chosen > 1 and experts > 1:
        _color_bar(axes, top + cell * experts + BAR_GAP, *_coactivation_scale(chosen, experts), left)
    else:
        theme.text(
            axes,
            left,
            top + cell * experts + 40,
            "Each token has one expert: none are chosen together.",
            color=theme.MUTED,
        )
    return figure


def distances(statistics: RoutingStatistics, block: int, split: str, step: int | None = None) -> Figure:
    """Task x task: Jensen-Shannon distance between the tasks' shares of choices."""
    tasks, apart = statistics.tasks, statistics.distances()
    numbers = len(tasks) <= MAX_NUMBERED[0]
    left = MARGIN + _label_width(tasks)
    cell = min(1.25 * MAX_CELL, (WIDTH - left - MARGIN - 80) / len(tasks))
    steep = 40 if cell > 30 else 60  # degrees, so that neighbors do not touch
    top = TITLE + 40 + _label_width(tasks) * np.sin(np.radians(steep))
    figure, axes = theme.canvas(WIDTH, round(top + cell * len(tasks) + BAR_ROOM))
    _title(axes, f"Block {block}: how far apart tasks route", _subtitle(split, step))
    theme.text(axes, MARGIN, TITLE + 12, "Jensen-Shannon distance of their shares of choices")
    _cells(axes, left, top, cell, cell, apart, [[f"{v:.2f}" for v in r] for r in apart] if numbers else None)
    _row_labels(axes, left, top, cell, tasks)
    for index, task in enumerate(tasks):
        theme.text(
            axes,
            left + (index + 0.5) * cell,
            top - 8,
            theme.shorten(task, MAX_LETTERS),
            ha="left",
            va="bottom",
            rotation=steep,
            rotation_mode="anchor",
        )
    _color_bar(axes, top + cell * len(tasks) + BAR_GAP, None, 1.0, left, "0: same use of experts", "1: none in common")
    return figure


def overview(by_block: dict[int, RoutingStatistics], split: str = "validation", step: int | None = None) -> Figure:
    """Block x expert: share of all choices, each task counting alike, and each block's numbers beside it."""
    experts = max(s.experts for s in by_block.values())
    left, right = MARGIN + 92, 3 * 82
    column = min(MAX_CELL, (WIDTH - left - right - MARGIN) / experts)
    top = TITLE + 62
    figure, axes = theme.canvas(WIDTH, round(top + ROW * len(by_block) + BAR_ROOM))
    _title(axes, "All blocks: load of each expert", _subtitle(split, step))
    shares = np.array([_mean_of_seen(s.shares("count")) for s in by_block.values()])
    _column_labels(axes, left, top, column, experts)
    _cells(
        axes,
        left,
        top,
        column,
        ROW,
        shares * experts / _scale_end(experts),
        [[f"{100 * v:.0f}" for v in r] for r in shares] if column >= 24 else None,
    )
    _row_labels(axes, left, top, ROW, [f"block {block}" for block in by_block])
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
    _color_bar(axes, top + ROW * len(by_block) + BAR_GAP, 1 / experts, _scale_end(experts) / experts, left)
    return figure


def ablation(result: Ablation, block: int, split: str, step: int | None = None) -> Figure:
    """Task x expert: percentage points of accuracy lost when the expert is masked."""
    points, (tasks, experts) = result.points(), result.lost.shape
    numbers = has_room_for_numbers(tasks, experts)
    left, top, row = MARGIN + 130, TITLE + 30, 44 if tasks <= MAX_NUMBERED[0] else 26
    column, bottom = (WIDTH - MARGIN - left) / experts, top + row * tasks
    figure, axes = theme.canvas(WIDTH, bottom + 46)
    _title(
        axes,
        f"Block {block}: accuracy lost without one expert",
        f"percentage points; {_subtitle(split, step)}, {result.images.max()} images a task",
    )
    _column_labels(axes, left, top, column, experts)
    _row_labels(axes, left, top, row, result.tasks)
    _cells(
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
    words = f"blue: loss, at most {max(0, points.max()):.1f}; brown: gain, at most {max(0, -points.min()):.1f}"
    theme.text(
        axes, WIDTH - MARGIN, bottom + 24, words + "; bold: more than chance" * numbers, color=theme.MUTED, ha="right"
    )
    return figure


def _scale_end(experts: int) -> float:
    """Where the scale of shares ends, in multiples of the uniform level."""
    return min(SCALE_END, experts)


def _coactivation_scale(chosen: float, experts: int) -> tuple[float, float]:
    """Uniform level and end of the scale of co-activation."""
    uniform = (chosen - 1) / max(1, experts - 1)
    return uniform, min(1.0, SCALE_END * uniform) or 1.0


def _mean_of_seen(shares: np.ndarray) -> np.ndarray:
    seen = ~np.isnan(shares[:, 0])
    return shares[seen].mean(0) if seen.any() else shares[0]


def _title(axes: Axes, title: str, when: str) -> None:
    theme.text(axes, MARGIN, 28, title, size=theme.HEADING, weight="bold")
    theme.text(axes, MARGIN, 58, when, color=theme.MUTED)


def _subtitle(split: str, step: int | None) -> str:
    return split if step is None else f"{split}, step {step:,}"


def _cells(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    values: np.ndarray,
    numbers: list[list[str]] | None,
    scale: Callable = theme.sequential,
    size: float = theme.SMALL,
    bold: np.ndarray | None = None,
) -> None:
    """Colored cells from (x, y) on; values (R, C) as `scale` takes them."""
    rows, columns = values.shape
    colors = scale(values)
    axes.imshow(
        colors, extent=(x, x + columns * width, y + rows * height, y), interpolation="nearest", aspect="auto", zorder=1
    )
    gap = 1.5 if min(width, height) >= 14 else 0.5
    axes.vlines(x + width * np.arange(columns + 1), y, y + rows * height, "white", linewidth=gap, zorder=2)
    axes.hlines(y + height * np.arange(rows + 1), x, x + columns * width, "white", linewidth=gap, zorder=2)
    axes.plot(
        [x, x + columns * width, x + columns * width, x, x],
        [y, y, y + rows * height, y + rows * height, y],
        color=theme.FAINT,
        linewidth=1.5,
        zorder=3,
    )
    for (row, column), value in np.ndenumerate(values):
        if numbers is not None and not np.isnan(value):
            theme.text(
                axes,
                x + (column + 0.5) * width,
                y + (row + 0.5) * height,
                numbers[row][column],
                min(size, 0.47 * width),
                ha="center",
                color=theme.text_color_on(colors[row, column]),
                weight="bold" if bold is not None and bold[row, column] else "normal",
            )


def _row_labels(axes: Axes, x: float, y: float, height: float, names: Sequence[str], size: float = theme.SMALL) -> None:
    for index, name in enumerate(names):
        theme.text(axes, x - 10, y + (index + 0.5) * height, theme.shorten(name, MAX_LETTERS), ha="right", size=size)


def _label_interval(width: float) -> int:
    """How many experts share a number beside their cells: one, or four where there is no room."""
    return 1 if width >= 20 else 4


def _column_labels(axes: Axes, x: float, y: float, width: float, experts: int) -> None:
    """The experts' numbers above their columns; every one, or every fourth where there is no room."""
    for expert in range(0, experts, _label_interval(width)):
        theme.text(axes, x + (expert + 0.5) * width, y - 14, str(expert), ha="center", color=theme.MUTED, size=NUMBER)


def _color_bar(
    axes: Axes, y: float, uniform: float | None, end: float, x: float, low: str = "0", high: str = ""
) -> None:
    """The color scale from 0 to `end`, the uniform level marked on it."""
    width = WIDTH - x - MARGIN
    axes.imshow(theme.sequential(np.linspace(0, 1, 256))[None], extent=(x, x + width, y + 16, y), aspect="auto")
    axes.plot([x, x + width, x + width, x, x], [y, y, y + 16, y + 16, y], color=theme.MUTED, linewidth=1)
    theme.text(axes, x, y + 35, low, color=theme.MUTED)
    most = high or f"{100 * end:.3g} %" + " or more" * (end < 1)
    theme.text(axes, x + width, y + 35, most, ha="right", color=theme.MUTED)
    if uniform is not None:
        place = x + width * uniform / end
        axes.plot([place, place], [y - 8, y + 20], color=theme.INK, linewidth=3)
        side = "right" if place > x + width - 80 else "center"
        theme.text(axes, place, y - 19, f"uniform {100 * uniform:.3g} %", ha=side, weight="bold")


def _label_width(names: Sequence[str]) -> float:
    """Room for row names in pixels, the gap to the cells included."""
    return 14 + 10.4 * max(len(theme.shorten(name, MAX_LETTERS)) for name in names)
