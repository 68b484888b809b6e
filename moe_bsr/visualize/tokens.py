"""Draw token strips: how the patches of an image are scored, dropped, fused or merged, and routed to experts.

A strip has the image on the left. Beside it are the score of each patch at the first drop, and what each drop kept, or
the mean colors of merged patches. Below, for each MoE block, the remaining patches have the color of their best expert.
Dropped patches are grayed. All data come from the records of the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moe_bsr.evaluation.probe import ProbeResult
from moe_bsr.model.block import Record
from moe_bsr.model.tokens import FUSED
from moe_bsr.visualize import theme

if TYPE_CHECKING:  # drawing alone needs matplotlib; importing this file does not load it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = theme.WIDTH
GAP, HEADER, CLASS_NAMES, CAPTION = 12, 46, 40, 56  # pixels
COLUMNS = 4
LEGEND_COLUMNS, LEGEND_SQUARE, LEGEND_TITLE = 32, 40, 32
MIN_NUMBERED = 17  # side in pixels from which patches have their expert's number
MAX_LETTERS = 24  # of a class name
FADING = 0.82  # how far dropped patches are faded, from 0 (not) to 1 (white)


@dataclass(slots=True)
class TokenTrace:
    """What happens to the G patches of one image in the network.

    Attributes:
        scores: (G,) float, by which the first drop ranks the patches; None without drops.
        kept: by drop block, ((G,) bool patch is kept, number of fused tokens beside the patches).
        merged: by block that merges, (G,) int, the token to which each patch then belongs.
        experts: by MoE block, (G,) int, the best expert of each patch; -1 if the patch was dropped before.
    """

    scores: np.ndarray | None = None
    kept: dict[int, tuple[np.ndarray, int]] = field(default_factory=dict)
    merged: dict[int, np.ndarray] = field(default_factory=dict)
    experts: dict[int, np.ndarray] = field(default_factory=dict)


def trace_tokens(records: dict[int, Record], place: int, patches: int) -> TokenTrace:
    """Return the trace of image `place` of a batch.

    Args:
        records: records of the forward pass by block (`multitask.Output.records`).
        patches: G, number of patches of the image.
    """
    found, origin, merged = TokenTrace(), np.arange(patches), None
    for index in sorted(records):
        dropped, routing = records[index].dropped, records[index].routing
        if dropped is not None and dropped.place is not None:
            origin = dropped.origin[place].cpu().numpy()
            merged = found.merged[index] = dropped.place[place].cpu().numpy()
        elif dropped is not None:
            if found.scores is None and dropped.scores is not None:
                found.scores = dropped.scores[place].float().cpu().numpy()
            origin = dropped.origin[place].cpu().numpy()
            kept = np.zeros(patches, bool)
            kept[origin[origin != FUSED]] = True
            found.kept[index] = kept, int((origin == FUSED).sum())
        if routing is not None:
            best = routing.experts[place, :, 0].cpu().numpy()[-len(origin) :]  # prefix tokens come first
            chosen = np.full(patches, -1)
            chosen[origin[origin != FUSED]] = best[origin != FUSED]
            found.experts[index] = chosen if merged is None else best[merged]
    return found


@dataclass(slots=True)
class View:
    """Image with its trace and its class names.

    Attributes:
        image: (3, S, S) uint8.
        grid: rows and columns of patches.
        true, predicted: class names.
    """

    image: np.ndarray
    grid: tuple[int, int]
    true: str
    predicted: str
    trace: TokenTrace


def make_views(result: ProbeResult, class_names: Sequence[str], grid: tuple[int, int]) -> list[View]:
    """Return a view of each image of a probe; `grid` is the rows and columns of patches."""
    return [
        View(
            image.numpy(),
            grid,
            class_names[label],
            class_names[predicted],
            trace_tokens(result.records, place, grid[0] * grid[1]),
        )
        for place, (image, label, predicted) in enumerate(
            zip(result.images, result.labels.tolist(), result.predicted.tolist(), strict=True)
        )
    ]


def strip(task: str, views: Sequence[View], experts: int = 0, note: str = "") -> Figure:
    """Draw one picture of a task, with a strip for each image below each other.

    Args:
        experts: number of experts E, whose colors the legend shows; 0 for a dense model.
        note: text beside the task's name, such as step and split.
    """
    places, columns = _layout(views[0].trace)
    side = (WIDTH - GAP) // columns - GAP
    legend = _legend_grid(experts)
    top = HEADER + (LEGEND_TITLE + legend[1] * legend[2] if experts else 0)
    strip_height = CLASS_NAMES + (1 + max(row for row, _ in places.values())) * (side + CAPTION)
    figure, axes = theme.canvas(WIDTH, round(top + len(views) * strip_height))
    theme.text(axes, GAP, HEADER / 2, task, theme.HEADING, weight="bold")
    theme.text(axes, WIDTH - GAP, HEADER / 2, note, theme.LABEL, color=theme.MUTED, ha="right")
    if experts:
        _legend(axes, *legend, experts)
    for number, view in enumerate(views):
        _draw_image(axes, view, places, side, top + number * strip_height, experts)
    return figure


def _layout(trace: TokenTrace) -> tuple[dict[tuple, tuple[int, int]], int]:
    """Return row and column of every panel, and the number of columns.

    Panels are ("image",), ("score",), ("kept", block), ("merged", block) and ("experts", block). With drops and
    experts, image and score are on the left, the drops right of the image, and the experts right of the score.
    Otherwise all panels follow each other, five in a row if there are five.
    """
    kept = [("kept", block) for block in trace.kept] + [("merged", block) for block in trace.merged]
    score = [("score",)] * (trace.scores is not None)
    experts = [("experts", block) for block in trace.experts]
    if not (kept and experts):
        panels = [("image",), *score, *kept, *experts]
        columns = 5 if len(panels) == 5 else COLUMNS
        return {panel: divmod(i, columns) for i, panel in enumerate(panels)}, columns
    right = COLUMNS - 1
    below = 1 + (len(kept) - 1) // right
    return (
        {("image",): (0, 0)}
        | dict.fromkeys(score, (below, 0))
        | {panel: (i // right, 1 + i % right) for i, panel in enumerate(kept)}
        | {panel: (below + i // right, 1 + i % right) for i, panel in enumerate(experts)}
    ), COLUMNS


def _draw_image(
    axes: Axes, view: View, places: dict[tuple, tuple[int, int]], side: int, top: float, experts: int
) -> None:
    """Draw the class names and the panels of one image, each panel with two lines of text below."""
    wrong = view.true != view.predicted
    theme.text(
        axes, GAP, top + CLASS_NAMES / 2, f"true: {theme.shorten(view.true, MAX_LETTERS)}", theme.LABEL, weight="bold"
    )
    predicted = theme.shorten(view.predicted, MAX_LETTERS) + " (wrong)" * wrong
    theme.text(
        axes,
        WIDTH - GAP,
        top + CLASS_NAMES / 2,
        f"predicted: {predicted}",
        theme.LABEL,
        color=theme.WRONG if wrong else theme.INK,
        ha="right",
    )
    for (kind, *block), (row, column) in places.items():
        x, y = GAP + column * (side + GAP), top + CLASS_NAMES + row * (side + CAPTION)
        if kind == "image":
            picture = view.image.transpose(1, 2, 0)
            words = "image", f"{view.grid[0]} x {view.grid[1]} patches"
        elif kind == "score":
            picture = theme.sequential((view.trace.scores / view.trace.scores.max()).reshape(view.grid))
            words = f"score, block {min(view.trace.kept)}", f"0 to {100 * view.trace.scores.max():.1f} %"
        elif kind == "kept":
            kept, fused = view.trace.kept[block[0]]
            picture = _fade_dropped(view, kept)
            words = f"after block {block[0]}", f"{kept.sum()}" + f" + {fused} fused" * (fused > 0)
        elif kind == "merged":
            place = view.trace.merged[block[0]]
            picture = _mean_of_merged(view, place)
            words = f"after block {block[0]}", f"{place.max() + 1} tokens"
        else:
            chosen = view.trace.experts[block[0]]
            picture = _color_by_expert(view, chosen, experts)
            words = f"experts, block {block[0]}", f"{len(np.unique(chosen[chosen >= 0]))} different"
        sharp = "nearest" if len(picture) <= side else "auto"  # "auto" smooths a picture that is made smaller
        axes.imshow(picture, extent=(x, x + side, y + side, y), interpolation=sharp, aspect="auto")
        axes.plot([x, x + side, x + side, x, x], [y, y, y + side, y + side, y], color=theme.FAINT)
        theme.text(axes, x, y + side + 0.26 * CAPTION, words[0], theme.SMALL)
        theme.text(axes, x, y + side + 0.66 * CAPTION, words[1], theme.SMALL, color=theme.MUTED)
        if kind == "experts":
            _write_expert_numbers(axes, chosen.reshape(view.grid), x, y, side / max(view.grid), experts)


def _fade_dropped(view: View, kept: np.ndarray) -> np.ndarray:
    """Return the image with its dropped patches faded."""
    picture = view.image.transpose(1, 2, 0).astype(float)
    there = _upsample(kept.reshape(view.grid), picture.shape[0])[..., None]
    faded = FADING * 255 + (1 - FADING) * picture.mean(-1, keepdims=True)
    return np.where(there, picture, faded).astype(np.uint8)


def _mean_of_merged(view: View, place: np.ndarray) -> np.ndarray:
    """Return the image with the patches of each merged token in their mean color."""
    picture = view.image.transpose(1, 2, 0)
    token = _upsample(place.reshape(view.grid), picture.shape[0])
    pixels = np.bincount(token.ravel())
    means = np.stack([np.bincount(token.ravel(), picture[..., c].ravel()) / pixels for c in range(3)], -1)
    alone = np.bincount(place)[token] == 1
    return np.where(alone[..., None], picture, means[token]).astype(np.uint8)


def _color_by_expert(view: View, chosen: np.ndarray, experts: int) -> np.ndarray:
    """Return the patches in the colors of their experts, and dropped ones as in the faded image."""
    picture = _fade_dropped(view, np.zeros(len(chosen), bool))
    there = _upsample((chosen >= 0).reshape(view.grid), picture.shape[0])
    colors = _upsample(theme.expert_colors(experts)[chosen].reshape(*view.grid, 3), picture.shape[0])
    return np.where(there[..., None], 255 * colors, picture).astype(np.uint8)


def _write_expert_numbers(axes: Axes, chosen: np.ndarray, x: float, y: float, side: float, experts: int) -> None:
    """Write its expert on each patch, if the patches are large enough."""
    if side < MIN_NUMBERED:
        return
    colors = theme.expert_colors(experts)
    for (row, column), expert in np.ndenumerate(chosen):
        if expert >= 0:
            place = x + (column + 0.5) * side, y + (row + 0.5) * side
            theme.number(axes, *place, str(expert), theme.TINY, theme.text_color_on(colors[expert]))


def _legend_grid(experts: int) -> tuple[int, int, float]:
    """Return the number of columns and rows of the legend, and the side of its squares in pixels."""
    rows = -(-experts // LEGEND_COLUMNS)
    columns = -(-experts // max(1, rows))
    return columns, rows, min(LEGEND_SQUARE, (WIDTH - 2 * GAP) / max(1, columns))


def _legend(axes: Axes, columns: int, rows: int, side: float, experts: int) -> None:
    """Draw the legend of the experts' colors."""
    theme.text(
        axes,
        GAP,
        HEADER + LEGEND_TITLE / 3,
        "color: the patch's best expert; pale gray: dropped",
        theme.SMALL,
        color=theme.MUTED,
    )
    for expert, color in enumerate(theme.expert_colors(experts)):
        x, y = GAP + expert % columns * side, HEADER + LEGEND_TITLE * 0.75 + expert // columns * side
        axes.fill([x, x + side - 2, x + side - 2, x], [y, y, y + side - 2, y + side - 2], color=color, linewidth=0)
        place = x + side / 2 - 1, y + side / 2 - 1
        theme.number(axes, *place, str(expert), theme.TINY, theme.text_color_on(color))


def _upsample(patches: np.ndarray, size: int) -> np.ndarray:
    """Enlarge (rows, columns, ...) to (size, size, ...): each pixel gets the value of its patch."""
    rows, columns = (np.arange(size) * n // size for n in patches.shape[:2])
    return patches[rows[:, None], columns]
