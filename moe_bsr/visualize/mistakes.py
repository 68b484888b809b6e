"""Draw the mistakes of a model: a confusion matrix, and the images of the most wrong answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.evaluation.mistakes import Mistakes
from moe_bsr.visualize import cells, theme
from moe_bsr.visualize.cells import MARGIN, TITLE, WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 20  # most classes of a matrix; of more classes, those with the most mistakes are drawn
MAX_CELL = 46
COLUMNS, IMAGE_GAP, CAPTION = 4, 16, 76
WORST = 2 * COLUMNS  # most images of wrong answers
MAX_LETTERS = 17  # of a class name below an image
OTHERS = "others"


def confusion(task: str, found: Mistakes, note: str) -> Figure:
    """Draw true class x answer: numbers of images, colored by their share of the true class. Mistakes are red.

    Args:
        note: text that says which images and weights were used.
    """
    names, counts, which = _most_confused(found)
    left = MARGIN + cells.label_width(names)
    cell = min(MAX_CELL, (WIDTH - left - MARGIN - 40) / counts.shape[1])
    top = TITLE + 46 + cells.slanted_height(names, cell)
    bottom = top + cell * len(counts)
    figure, axes = theme.canvas(WIDTH, round(bottom + 46))
    cells.title(axes, f"{task}: confusion matrix", note + which)
    theme.text(axes, MARGIN, TITLE + 12, "row: true class; column: answer; numbers of images")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.eye(*counts.shape, dtype=bool)
    size = min(theme.SMALL, 0.5 * cell)
    numbers = [[str(n) if n else "" for n in row] for row in counts]
    colors = np.where(right[..., None], theme.sequential(shares), theme.reddish(shares))
    cells.cells(axes, left, top, cell, cell, colors, numbers, scale=lambda colors: colors, size=size)
    cells.row_labels(axes, left, top, cell, names[: len(counts)], size=min(theme.SMALL, 0.62 * cell))
    cells.slanted_labels(axes, left, top, cell, names, size=min(theme.SMALL, 0.62 * cell))
    words = "blue: right; red: wrong; darker: a larger share of the row"
    theme.text(axes, MARGIN, bottom + 24, words, color=theme.MUTED)
    return figure


def _most_confused(found: Mistakes) -> tuple[list[str], np.ndarray, str]:
    """Choose the classes to draw: all, or those with the most mistakes.

    Returns:
        Names of the columns, counts (rows, columns), and a text that says which classes they are.
    """
    counts, names = found.counts, list(found.class_names)
    if len(names) <= CLASSES:
        return names, counts, ""
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    chosen = np.sort(np.argsort(-wrong, kind="stable")[:CLASSES])
    inner = counts[np.ix_(chosen, chosen)]
    others = counts[chosen].sum(1) - inner.sum(1)
    words = f"; the {CLASSES} most confused of {len(names)} classes"
    return [*(names[i] for i in chosen), OTHERS], np.column_stack([inner, others]), words


def worst(task: str, found: Mistakes, note: str) -> Figure | None:
    """Draw the wrong answers with the largest loss: image, true class and answer. None if no answer is wrong."""
    if not found.worst:
        return None
    side = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * IMAGE_GAP) / COLUMNS
    shown = found.worst[:WORST]
    height = TITLE + -(-len(shown) // COLUMNS) * (side + CAPTION)
    figure, axes = theme.canvas(WIDTH, round(height))
    cells.title(axes, f"{task}: the most wrong answers", f"{note}; bold: true class, red: answer")
    for place, mistake in enumerate(shown):
        row, column = divmod(place, COLUMNS)
        x, y = MARGIN + column * (side + IMAGE_GAP), TITLE + row * (side + CAPTION)
        sharp = "nearest" if mistake.image.shape[1] <= side else "auto"
        picture = mistake.image.transpose(1, 2, 0)
        axes.imshow(picture, extent=(x, x + side, y + side, y), interpolation=sharp, aspect="auto")
        theme.text(axes, x, y + side + 18, theme.shorten(mistake.true, MAX_LETTERS), weight="bold")
        answer = f"{theme.shorten(mistake.predicted, MAX_LETTERS - 5)} {100 * mistake.confidence:.0f} %"
        theme.text(axes, x, y + side + 41, answer, color=theme.WRONG)
    return figure
