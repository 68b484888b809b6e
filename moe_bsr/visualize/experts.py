"""Pictures of routing statistics and ablations: tasks x experts, experts x experts, tasks x tasks, blocks x experts.

All are tables of colored cells. Shares are colored on one scale, from 0 to four times the uniform
level and the same at every step, so that pictures of different blocks and times can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.visualize import theme as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_bsr.evaluation.ablation import Ablation

WIDTH, EDGE, GAP = style.WIDTH, 18, 28
TITLE = 78  # pixels of heading and subtitle
ROW, LOW_ROW = 38, 23  # height of a row with and without numbers
WIDEST = 64  # of a cell
LIFT, BAR = 42, 110  # pixels from the cells to the color bar, and to the end of the paper
NUMBERED = (10, 16)  # most tasks and experts with numbers in the cells
NUMBER = 15  # font size of the experts' numbers
LONGEST = 13  # letters of a task's name
STRETCH = 4  # the scale of shares ends at so many times the uniform level
PALE = 5.0  # points lost up to which no cell has full color: noise should look like noise


def numbered(tasks: int, experts: int) -> bool:
    """Whether cells have room for numbers; where not, a table belongs beside the picture."""
    return tasks <= NUMBERED[0] and experts <= NUMBERED[1]


def heatmap(statistics: RoutingStatistics, block: int, split: str, step: int | None = None) -> Figure:
    """Task x expert: share of the choices and share of the gate weight; rows sum to 1.

    Args:
        split: which tokens were counted, such as "training since step 20" or "validation".
    """
    tasks, experts = statistics.tasks, statistics.experts
    numbers = numbered(len(tasks), experts)
    beside = experts <= NUMBERED[1] // 2
    row = ROW if numbers else LOW_ROW
    left = EDGE + _widest(tasks)
    width = (WIDTH - left - EDGE - GAP) / 2 if beside else WIDTH - left - EDGE
    column = min(WIDEST, width / experts)
    panel = 60 + row * len(tasks) + 14
    figure, axes = style.paper(WIDTH, round(TITLE + panel * (2 - beside) - 14 + BAR))
    _head(axes, f"Block {block}: experts used by each task", _when(split, step))
    for number, (of, words) in enumerate({"count": "choices", "gate": "gate weight"}.items()):
        shares = statistics.shares(of)
        x = left + (width + GAP) * number * beside
        y = TITLE + panel * number * (not beside) + 60
        style.text(axes, x, y - 44, f"share of {words}, %", weight="bold")
        _columns(axes, x, y, column, experts)
        _cells(
            axes,
            x,
            y,
            column,
            row,
            shares * experts / _stretch(experts),
            [[f"{100 * v:.0f}" for v in r] for r in shares] if numbers else None,
        )
        if number == 0 or not beside:
            _rows(axes, x, y, row, tasks)
        for index in np.flatnonzero(~statistics.seen):
            style.text(
                axes, x + 8, y + (index + 0.5) * row, "no data", size=style.SMALL if numbers else 14, color=style.MUTED
            )
    _bar(axes, y + row * len(tasks) + LIFT, 1 / experts, _stretch(experts) / experts, left)
    return figure


def coactivation(statistics: RoutingStatistics, block: int, split: str, step: int | None = None) -> Figure:
    """Expert x expert: of the tokens that chose the row's, the share that also chose the column's."""
    experts, shares = statistics.experts, statistics.together()
    chosen = statistics.top_k
    left = EDGE + 46
    cell = min(WIDEST, (WIDTH - left - EDGE) / experts)
    top = TITLE + 64
    figure, axes = style.paper(WIDTH, round(top + cell * experts + BAR))
    _head(axes, f"Block {block}: experts chosen together", _when(split, step))
    style.text(axes, EDGE, TITLE + 12, "% of the row's tokens that also chose the column's expert")
    _columns(axes, left, top, cell, experts)
    _cells(
        axes,
        left,
        top,
        cell,
        cell,
        shares / _together_scale(chosen, experts)[1],
        [[f"{100 * v:.0f}" for v in r] for r in shares] if experts <= NUMBERED[1] else None,
    )
    every = _every(cell)
    _rows(axes, left, top, cell, [str(i) if i % every == 0 else "" for i in range(experts)], NUMBER)
    if chosen > 1 and experts > 1:
        _bar(axes, top + cell * experts + LIFT, *_together_scale(chosen, experts), left)
    else:
        style.text(
            axes,
            left,
            top + cell * experts + 40,
            "Each token has one expert: none are chosen together.",
            color=style.MUTED,
        )
    return figure


def distances(statistics: RoutingStatistics, block: int, split: str, step: int | None = None) -> Figure:
    """Task x task: Jensen-Shannon distance between the tasks' shares of choices."""
    tasks, apart = statistics.tasks, statistics.distances()
    numbers = len(tasks) <= NUMBERED[0]
    left = EDGE + _widest(tasks)
    cell = min(1.25 * WIDEST, (WIDTH - left - EDGE - 80) / len(tasks))
    steep = 40 if cell > 30 else 60  # degrees, so that neighbors do not touch
    top = TITLE + 40 + _widest(tasks) * np.sin(np.radians(steep))
    figure, axes = style.paper(WIDTH, round(top + cell * len(tasks) + BAR))
    _head(axes, f"Block {block}: how far apart tasks route", _when(split, step))
    style.text(axes, EDGE, TITLE + 12, "Jensen-Shannon distance of their shares of choices")
    _cells(axes, left, top, cell, cell, apart, [[f"{v:.2f}" for v in r] for r in apart] if numbers else None)
    _rows(axes, left, top, cell, tasks)
    for index, task in enumerate(tasks):
        style.text(
            axes,
            left + (index + 0.5) * cell,
            top - 8,
            style.shorten(task, LONGEST),
            ha="left",
            va="bottom",
            rotation=steep,
            rotation_mode="anchor",
        )
    _bar(axes, top + cell * len(tasks) + LIFT, None, 1.0, left, "0: same use of experts", "1: none in common")
    return figure


def overview(by_block: dict[int, RoutingStatistics], split: str = "validation", step: int | None = None) -> Figure:
    """Block x expert: share of all choices, each task counting alike, and each block's numbers beside it."""
    experts = max(s.experts for s in by_block.values())
    left, right = EDGE + 92, 3 * 82
    column = min(WIDEST, (WIDTH - left - right - EDGE) / experts)
    top = TITLE + 62
    figure, axes = style.paper(WIDTH, round(top + ROW * len(by_block) + BAR))
    _head(axes, "All blocks: load of each expert", _when(split, step))
    shares = np.array([_mean_of_seen(s.shares("count")) for s in by_block.values()])
    _columns(axes, left, top, column, experts)
    _cells(
        axes,
        left,
        top,
        column,
        ROW,
        shares * experts / _stretch(experts),
        [[f"{100 * v:.0f}" for v in r] for r in shares] if column >= 24 else None,
    )
    _rows(axes, left, top, ROW, [f"block {block}" for block in by_block])
    for place, (name, words) in enumerate(
        (
            ("load_cv", ("load", "CV")),
            ("dead_experts", ("dead", "experts")),
            ("mutual_information", ("special-", "isation")),
        )
    ):
        x = left + column * experts + 82 * (place + 1)
        for line, word in enumerate(words):
            style.text(axes, x, top - 46 + 20 * line, word, ha="right", color=style.MUTED)
        for number, s in enumerate(by_block.values()):
            value = s.numbers()[name]
            shown = "-" if np.isnan(value) else f"{value:.0f}" if name == "dead_experts" else f"{value:.2f}"
            style.text(axes, x, top + (number + 0.5) * ROW, shown, ha="right")
    _bar(axes, top + ROW * len(by_block) + LIFT, 1 / experts, _stretch(experts) / experts, left)
    return figure


def ablation(result: Ablation, block: int, split: str, step: int | None = None) -> Figure:
    """Task x expert: percentage points of accuracy lost when the expert is masked."""
    points, (tasks, experts) = result.points(), result.lost.shape
    numbers = numbered(tasks, experts)
    left, top, row = EDGE + 130, TITLE + 30, 44 if tasks <= NUMBERED[0] else 26
    column, bottom = (WIDTH - EDGE - left) / experts, top + row * tasks
    figure, axes = style.paper(WIDTH, bottom + 46)
    _head(
        axes,
        f"Block {block}: accuracy lost without one expert",
        f"percentage points; {_when(split, step)}, {result.images.max()} images a task",
    )
    _columns(axes, left, top, column, experts)
    _rows(axes, left, top, row, result.tasks)
    _cells(
        axes,
        left,
        top,
        column,
        row,
        points / max(np.abs(points).max(), PALE),
        [[f"{v:.{int(abs(v) < 9.95)}f}" for v in r] for r in points] if numbers else None,
        style.diverging,
        style.TINY + 1,
        result.clear(),
    )
    words = f"blue: loss, at most {max(0, points.max()):.1f}; brown: gain, at most {max(0, -points.min()):.1f}"
    style.text(
        axes, WIDTH - EDGE, bottom + 24, words + "; bold: more than chance" * numbers, color=style.MUTED, ha="right"
    )
    return figure


def _stretch(experts: int) -> float:
    """Where the scale of shares ends, in multiples of the uniform level."""
    return min(STRETCH, experts)


def _together_scale(chosen: float, experts: int) -> tuple[float, float]:
    """Uniform level and end of the scale of co-activation."""
    uniform = (chosen - 1) / max(1, experts - 1)
    return uniform, min(1.0, STRETCH * uniform) or 1.0


def _mean_of_seen(shares: np.ndarray) -> np.ndarray:
    seen = ~np.isnan(shares[:, 0])
    return shares[seen].mean(0) if seen.any() else shares[0]


def _head(axes: Axes, title: str, when: str) -> None:
    style.text(axes, EDGE, 28, title, size=style.HEADING, weight="bold")
    style.text(axes, EDGE, 58, when, color=style.MUTED)


def _when(split: str, step: int | None) -> str:
    return split if step is None else f"{split}, step {step:,}"


def _cells(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    values: np.ndarray,
    numbers: list[list[str]] | None,
    scale: Callable = style.sequential,
    size: float = style.SMALL,
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
        color=style.FAINT,
        linewidth=1.5,
        zorder=3,
    )
    for (row, column), value in np.ndenumerate(values):
        if numbers is not None and not np.isnan(value):
            style.text(
                axes,
                x + (column + 0.5) * width,
                y + (row + 0.5) * height,
                numbers[row][column],
                min(size, 0.47 * width),
                ha="center",
                color=style.on(colors[row, column]),
                weight="bold" if bold is not None and bold[row, column] else "normal",
            )


def _rows(axes: Axes, x: float, y: float, height: float, names: Sequence[str], size: float = style.SMALL) -> None:
    for index, name in enumerate(names):
        style.text(axes, x - 10, y + (index + 0.5) * height, style.shorten(name, LONGEST), ha="right", size=size)


def _every(width: float) -> int:
    """How many experts share a number beside their cells: one, or four where there is no room."""
    return 1 if width >= 20 else 4


def _columns(axes: Axes, x: float, y: float, width: float, experts: int) -> None:
    """The experts' numbers above their columns; every one, or every fourth where there is no room."""
    for expert in range(0, experts, _every(width)):
        style.text(axes, x + (expert + 0.5) * width, y - 14, str(expert), ha="center", color=style.MUTED, size=NUMBER)


def _bar(axes: Axes, y: float, uniform: float | None, end: float, x: float, low: str = "0", high: str = "") -> None:
    """The color scale from 0 to `end`, the uniform level marked on it."""
    width = WIDTH - x - EDGE
    axes.imshow(style.sequential(np.linspace(0, 1, 256))[None], extent=(x, x + width, y + 16, y), aspect="auto")
    axes.plot([x, x + width, x + width, x, x], [y, y, y + 16, y + 16, y], color=style.MUTED, linewidth=1)
    style.text(axes, x, y + 35, low, color=style.MUTED)
    most = high or f"{100 * end:.3g} %" + " or more" * (end < 1)
    style.text(axes, x + width, y + 35, most, ha="right", color=style.MUTED)
    if uniform is not None:
        place = x + width * uniform / end
        axes.plot([place, place], [y - 8, y + 20], color=style.INK, linewidth=3)
        side = "right" if place > x + width - 80 else "center"
        style.text(axes, place, y - 19, f"uniform {100 * uniform:.3g} %", ha=side, weight="bold")


def _widest(names: Sequence[str]) -> float:
    """Room for row names in pixels, the gap to the cells included."""
    return 14 + 10.4 * max(len(style.shorten(name, LONGEST)) for name in names)
