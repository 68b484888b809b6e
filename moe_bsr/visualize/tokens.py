"""Token strips: what became of one image's patches - scored, dropped, fused, and sent to which expert.

A strip has the image at its left; beside it the score of every patch at the first drop and what each drop
kept; below, at each MoE block, the patches that were still there in the color of their best expert.
What was dropped is grayed. Everything is drawn from the records of the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.evaluation.probe import ProbeResult
from moe_bsr.model.block import Record
from moe_bsr.model.tokens import FUSED
from moe_bsr.visualize import theme as style

if TYPE_CHECKING:  # drawing alone needs matplotlib; importing this file does not load it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = style.WIDTH
GAP, HEAD, NAMES, CAPTION = 12, 46, 40, 56  # pixels
COLUMNS = 4
KEY_COLUMNS, KEY_SQUARE, KEY_HEAD = 32, 40, 32
NUMBERED = 17  # patches of at least so many pixels carry their expert's number
LONGEST = 24  # letters of a class name
FADE = 0.82  # how far dropped patches go towards the paper's white


@dataclass(slots=True)
class Trace:
    """One image's way through the network, as arrays; G = number of patches of the image.

    Attributes:
        scores: (G,) float, what the first drop ranked the patches by; None without drops.
        kept: by drop block, ((G,) bool patch still there, number of fused tokens beside them).
        experts: by MoE block, (G,) int best expert of each patch, -1 where the patch was dropped.
    """

    scores: np.ndarray | None = None
    kept: dict[int, tuple[np.ndarray, int]] = field(default_factory=dict)
    experts: dict[int, np.ndarray] = field(default_factory=dict)


def trace(records: dict[int, Record], place: int, patches: int) -> Trace:
    """The way of image `place` of a batch.

    Args:
        records: of the forward pass, by block, as `multitask.Output` has them.
        patches: G, of the whole image.
    """
    found, origin = Trace(), np.arange(patches)
    for index in sorted(records):
        dropped, routing = records[index].dropped, records[index].routing
        if dropped is not None:
            if found.scores is None:
                found.scores = dropped.scores[place].float().cpu().numpy()
            origin = dropped.origin[place].cpu().numpy()
            kept = np.zeros(patches, bool)
            kept[origin[origin != FUSED]] = True
            found.kept[index] = kept, int((origin == FUSED).sum())
        if routing is not None:
            best = routing.experts[place, :, 0].cpu().numpy()[-len(origin) :]  # prefix tokens come first
            chosen = np.full(patches, -1)
            chosen[origin[origin != FUSED]] = best[origin != FUSED]
            found.experts[index] = chosen
    return found


@dataclass(slots=True)
class View:
    """An image with its trace and its names.

    Attributes:
        image: (3, S, S) uint8. grid: rows and columns of patches.
        true, predicted: class names.
    """

    image: np.ndarray
    grid: tuple[int, int]
    true: str
    predicted: str
    trace: Trace


def views_of(seen: ProbeResult, class_names: Sequence[str], grid: tuple[int, int]) -> list[View]:
    """What to draw of images that were watched; `grid` is the rows and columns of patches."""
    return [
        View(
            image.numpy(),
            grid,
            class_names[label],
            class_names[predicted],
            trace(seen.records, place, grid[0] * grid[1]),
        )
        for place, (image, label, predicted) in enumerate(
            zip(seen.images, seen.labels.tolist(), seen.predicted.tolist(), strict=True)
        )
    ]


def strip(task: str, views: Sequence[View], experts: int = 0, note: str = "") -> Figure:
    """One picture of a task: a strip for each image, one below the other.

    Args:
        experts: E of the model, whose colors the key explains; 0 for a dense one.
        note: said beside the task's name, such as step and split.
    """
    places, columns = _layout(views[0].trace)
    side = (WIDTH - GAP) // columns - GAP
    key = _key_squares(experts)
    top = HEAD + (KEY_HEAD + key[1] * key[2] if experts else 0)
    strip_height = NAMES + (1 + max(row for row, _ in places.values())) * (side + CAPTION)
    figure, axes = style.paper(WIDTH, round(top + len(views) * strip_height))
    style.text(axes, GAP, HEAD / 2, task, style.HEADING, weight="bold")
    style.text(axes, WIDTH - GAP, HEAD / 2, note, style.LABEL, color=style.MUTED, ha="right")
    if experts:
        _key(axes, *key, experts)
    for number, view in enumerate(views):
        _draw(axes, view, places, side, top + number * strip_height, experts)
    return figure


def _layout(trace: Trace) -> tuple[dict[tuple, tuple[int, int]], int]:
    """Row and column of every panel, by ("image",), ("score",), ("kept", block) and ("experts", block);
    and the number of columns.

    With drops and experts the image and the score stand left, the drops right of the one and the experts
    right of the other; otherwise all stand in a row, in which five are welcome.
    """
    kept = [("kept", block) for block in trace.kept]
    experts = [("experts", block) for block in trace.experts]
    if not (kept and experts):
        panels = [("image",), *[("score",)] * bool(kept), *kept, *experts]
        columns = 5 if len(panels) == 5 else COLUMNS
        return {panel: divmod(i, columns) for i, panel in enumerate(panels)}, columns
    right = COLUMNS - 1
    below = 1 + (len(kept) - 1) // right
    return (
        {("image",): (0, 0), ("score",): (below, 0)}
        | {panel: (i // right, 1 + i % right) for i, panel in enumerate(kept)}
        | {panel: (below + i // right, 1 + i % right) for i, panel in enumerate(experts)}
    ), COLUMNS


def _draw(axes: Axes, view: View, places: dict[tuple, tuple[int, int]], side: int, top: float, experts: int) -> None:
    """One image's names and panels, each panel with two lines of words below."""
    wrong = view.true != view.predicted
    style.text(axes, GAP, top + NAMES / 2, f"true: {style.shorten(view.true, LONGEST)}", style.LABEL, weight="bold")
    predicted = style.shorten(view.predicted, LONGEST) + " (wrong)" * wrong
    style.text(
        axes,
        WIDTH - GAP,
        top + NAMES / 2,
        f"predicted: {predicted}",
        style.LABEL,
        color=style.WRONG if wrong else style.INK,
        ha="right",
    )
    for (kind, *block), (row, column) in places.items():
        x, y = GAP + column * (side + GAP), top + NAMES + row * (side + CAPTION)
        if kind == "image":
            picture = view.image.transpose(1, 2, 0)
            words = "image", f"{view.grid[0]} x {view.grid[1]} patches"
        elif kind == "score":
            picture = style.sequential((view.trace.scores / view.trace.scores.max()).reshape(view.grid))
            words = f"score, block {min(view.trace.kept)}", f"0 to {100 * view.trace.scores.max():.1f} %"
        elif kind == "kept":
            kept, fused = view.trace.kept[block[0]]
            picture = _kept(view, kept)
            words = f"after block {block[0]}", f"{kept.sum()}" + f" + {fused} fused" * (fused > 0)
        else:
            chosen = view.trace.experts[block[0]]
            picture = _experts(view, chosen, experts)
            words = f"experts, block {block[0]}", f"{len(np.unique(chosen[chosen >= 0]))} different"
        sharp = "nearest" if len(picture) <= side else "auto"  # the latter smooths what is made smaller
        axes.imshow(picture, extent=(x, x + side, y + side, y), interpolation=sharp, aspect="auto")
        axes.plot([x, x + side, x + side, x, x], [y, y, y + side, y + side, y], color=style.FAINT)
        style.text(axes, x, y + side + 0.26 * CAPTION, words[0], style.SMALL)
        style.text(axes, x, y + side + 0.66 * CAPTION, words[1], style.SMALL, color=style.MUTED)
        if kind == "experts":
            _number(axes, chosen.reshape(view.grid), x, y, side / max(view.grid), experts)


def _kept(view: View, kept: np.ndarray) -> np.ndarray:
    """The image, its dropped patches faded."""
    picture = view.image.transpose(1, 2, 0).astype(float)
    there = _enlarge(kept.reshape(view.grid), picture.shape[0])[..., None]
    faded = FADE * 255 + (1 - FADE) * picture.mean(-1, keepdims=True)
    return np.where(there, picture, faded).astype(np.uint8)


def _experts(view: View, chosen: np.ndarray, experts: int) -> np.ndarray:
    """Patches in the colors of their experts, over the faded image where they were dropped."""
    picture = _kept(view, np.zeros(len(chosen), bool))
    there = _enlarge((chosen >= 0).reshape(view.grid), picture.shape[0])
    colors = _enlarge(style.experts(experts)[chosen].reshape(*view.grid, 3), picture.shape[0])
    return np.where(there[..., None], 255 * colors, picture).astype(np.uint8)


def _number(axes: Axes, chosen: np.ndarray, x: float, y: float, side: float, experts: int) -> None:
    """Write each patch's expert on it, if the patches' sides are long enough."""
    if side < NUMBERED:
        return
    for (row, column), expert in np.ndenumerate(chosen):
        if expert >= 0:
            style.text(
                axes,
                x + (column + 0.5) * side,
                y + (row + 0.5) * side,
                expert,
                style.TINY,
                ha="center",
                color=style.on(style.experts(experts)[expert]),
            )


def _key_squares(experts: int) -> tuple[int, int, float]:
    """Columns, rows and the side in pixels of the key's squares."""
    rows = -(-experts // KEY_COLUMNS)
    columns = -(-experts // max(1, rows))
    return columns, rows, min(KEY_SQUARE, (WIDTH - 2 * GAP) / max(1, columns))


def _key(axes: Axes, columns: int, rows: int, side: float, experts: int) -> None:
    """What the colors of the patches mean."""
    style.text(
        axes,
        GAP,
        HEAD + KEY_HEAD / 3,
        "color: the patch's best expert; pale gray: dropped",
        style.SMALL,
        color=style.MUTED,
    )
    for expert, color in enumerate(style.experts(experts)):
        x, y = GAP + expert % columns * side, HEAD + KEY_HEAD * 0.75 + expert // columns * side
        axes.fill([x, x + side - 2, x + side - 2, x], [y, y, y + side - 2, y + side - 2], color=color, linewidth=0)
        style.text(axes, x + side / 2 - 1, y + side / 2 - 1, expert, style.TINY, ha="center", color=style.on(color))


def _enlarge(patches: np.ndarray, size: int) -> np.ndarray:
    """(rows, columns, ...) to (size, size, ...): each pixel takes its patch's value."""
    rows, columns = (np.arange(size) * n // size for n in patches.shape[:2])
    return patches[rows[:, None], columns]
