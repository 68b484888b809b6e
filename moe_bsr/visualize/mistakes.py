"""Pictures of what a model takes for what: a confusion matrix, and the images it is most wrong about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.evaluation.mistakes import Mistakes
from moe_bsr.visualize import cells, theme
from moe_bsr.visualize.cells import MARGIN, TITLE, WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 20  # of a matrix; of more, those with the most mistakes
MAX_CELL = 46
COLUMNS, IMAGE_GAP, CAPTION = 4, 16, 76
WORST = 2 * COLUMNS  # images
MAX_LETTERS = 17  # of a class name below an image
OTHERS = "others"


def confusion(task: str, found: Mistakes, note: str) -> Figure:
    """True class x answer: counts of images, colored by their share of the true class; mistakes stand out in red.

    Args:
        note: which images and weights.
    """
    names, counts, which = _most_confused(found)
    left = MARGIN + cells.label_width(names)
    cell = min(MAX_CELL, (WIDTH - left - MARGIN - 40) / counts.shape[1])
    top = TITLE + 46 + cells.slanted_height(names, cell)
    bottom = top + cell * len(counts)
    figure, axes = theme.canvas(WIDTH, round(bottom + 46))
    cells.title(axes, f"{task}: what is taken for what", note + which)
    theme.text(axes, MARGIN, TITLE + 12, "row: true class; column: answer; numbers of images")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.eye(*counts.shape, dtype=bool)
    size = min(theme.SMALL, 0.5 * cell)
    numbers = [[str(n) if n else "" for n in row] for row in counts]
    colors = np.where(right[..., None], theme.sequential(shares), theme.reddish(shares))
    cells.cells(axes, left, top, cell, cell, colors, numbers, scale=lambda colors: colors, size=size)
    cells.row_labels(axes, left, top, cell, names[: len(counts)], size=min(theme.SMALL, 0.62 * cell))
    cells.slanted_labels(axes, left, top, cell, names, size=min(theme.SMALL, 0.62 * cell))
    words = "blue: right; red: mistaken; darker: a larger share of the row"
    theme.text(axes, MARGIN, bottom + 24, words, color=theme.MUTED)
    return figure


def _most_confused(found: Mistakes) -> tuple[list[str], np.ndarray, str]:
    """Names of the columns, counts (rows, columns) and what to say of it: all classes, or the most confused ones."""
    counts, names = found.counts, list(found.class_names)
    if len(names) <= CLASSES:
        return names, counts, ""
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    chosen = np.sort(np.argsort(-wrong, kind="stable")[:CLASSES])
    inner = counts[np.ix_(chosen, chosen)]
    others = counts[chosen].sum(1) - inner.sum(1)
    words = f"; the {CLASSES} most mistaken of {len(names)} classes"
    return [*(names[i] for i in chosen), OTHERS], np.column_stack([inner, others]), words


def worst(task: str, found: Mistakes, note: str) -> Figure | None:
    """The images of the largest loss with their true name and the answer; None where nothing was wrong."""
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
