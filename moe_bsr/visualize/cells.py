"""Draw tables of colored cells, of which the pictures of experts and mistakes are made. Coordinates are pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.runtime.names import columns as letters
from moe_bsr.visualize import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, MARGIN, GAP = theme.WIDTH, 18, 28
TITLE = 78  # height of heading and subtitle
BAR_GAP, BAR_ROOM = 42, 110  # from the cells to the color bar, and to the lower end of the picture
NUMBER = 15  # font size of the experts' numbers
MAX_LETTERS = 13  # of the name of a row or column
LETTER = 10.4  # largest width of a letter at the usual size


def title(axes: Axes, words: str, when: str) -> None:
    """Write the two lines at the top of a picture: its heading, and which images and step it shows."""
    theme.text(axes, MARGIN, 28, words, size=theme.HEADING, weight="bold")
    theme.text(axes, MARGIN, 58, when, color=theme.MUTED)


def subtitle(split: str, step: int | None) -> str:
    """Return the text that says which images were counted, and at which step."""
    return split if step is None else f"{split}, step {step:,}"


def cells(
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
    """Draw colored cells, with the upper left corner at (x, y).

    Args:
        width, height: of one cell.
        values: (R, C) as `scale` takes them. A cell of NaN gets no number.
        numbers: texts of the cells; an empty one is left out.
        scale: maps `values` to RGB in [0, 1].
        size: largest font size of the numbers.
        bold: (R, C) bool, cells whose number is bold.
    """
    rows, columns = values.shape[:2]
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
    for row, column in np.ndindex(rows, columns):
        if numbers is not None and numbers[row][column] and not np.isnan(values[row, column]).any():
            theme.number(
                axes,
                x + (column + 0.5) * width,
                y + (row + 0.5) * height,
                numbers[row][column],
                min(size, 0.47 * width),
                theme.text_color_on(colors[row, column]),
                bold is not None and bool(bold[row, column]),
            )


def row_labels(axes: Axes, x: float, y: float, height: float, names: Sequence[str], size: float = theme.SMALL) -> None:
    """Write names left of their rows."""
    for index, name in enumerate(names):
        theme.text(axes, x - 10, y + (index + 0.5) * height, theme.shorten(name, MAX_LETTERS), ha="right", size=size)


def label_interval(width: float) -> int:
    """Return the step between the expert numbers that are written: 1, or 4 if cells are narrow."""
    return 1 if width >= 20 else 4


def column_labels(axes: Axes, x: float, y: float, width: float, experts: int) -> None:
    """Write the experts' numbers above their columns; only every fourth one if columns are narrow."""
    for expert in range(0, experts, label_interval(width)):
        theme.text(axes, x + (expert + 0.5) * width, y - 14, str(expert), ha="center", color=theme.MUTED, size=NUMBER)


def color_bar(
    axes: Axes, y: float, uniform: float | None, end: float, x: float, low: str = "0", high: str = ""
) -> None:
    """Draw the color scale from 0 to `end`, with a mark at the uniform level.

    Args:
        uniform: share of an expert if all are used equally; None draws no mark.
        low, high: labels of the two ends; by default 0, and `end` in percent.
    """
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


def slanted_labels(
    axes: Axes, x: float, y: float, width: float, names: Sequence[str], size: float = theme.SMALL
) -> None:
    """Write names above their columns, at an angle at which neighbors do not touch."""
    for index, name in enumerate(names):
        theme.text(
            axes,
            x + (index + 0.5) * width,
            y - 8,
            theme.shorten(name, MAX_LETTERS),
            size,
            ha="left",
            va="bottom",
            rotation=_slant(width),
            rotation_mode="anchor",
        )


def slanted_height(names: Sequence[str], width: float) -> float:
    """Return the height that `slanted_labels` needs above the cells."""
    return label_width(names) * np.sin(np.radians(_slant(width)))


def _slant(width: float) -> float:
    return 40 if width > 30 else 60


def label_width(names: Sequence[str]) -> float:
    """Return the width that row names need, with the gap to the cells."""
    return 14 + LETTER * max(letters(theme.shorten(name, MAX_LETTERS)) for name in names)
