"""The one visual language of all pictures: sizes, colors, and how a figure becomes pixels.

Figures are drawn at twice the width that TensorBoard's cards give them, in pixels (a font size of 17 is
17 pixels high), dark on white. Colors alone never carry a meaning: numbers or labels stand beside them.
matplotlib is loaded by the first call that draws, and its pyplot never.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

WIDTH = 760  # pixels
HEADING, LABEL, SMALL, TINY = 25, 19, 17, 12  # font sizes in pixels
INK, MUTED, FAINT = "#1a1a1a", "#595959", "#d9d9d9"  # words, words beside them, lines
EMPTY = "#f0f0f0"  # where there are no data
WRONG = "#b3261e"

# White to dark blue, darker throughout: equal steps also in gray print, and for every kind of color vision.
_SEQUENTIAL = ("#ffffff", "#dbe9f4", "#b0d2e7", "#78b3d6", "#4590c0", "#2169a8", "#10467f", "#08264d")
# Brown below, white at zero, blue above; alike in darkness on both sides.
_DIVERGING = ("#53300a", "#95591a", "#c28f4c", "#ecd3a8", "#ffffff", "#b9d7ea", "#5f9fcc", "#2169a8", "#0b3766")
# Okabe and Ito's palette (2008) for color-blind readers, without its black.
_FIRST = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
# What protanopes and deuteranopes see of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
_DEFICIENT = (
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
)
MAX_EXPERTS = 64  # with a color of their own


def figure(width: int, height: int) -> Figure:
    """An empty white figure of so many pixels; a font size or line width of 1 is one of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="white")
    FigureCanvasAgg(empty)
    return empty


def paper(width: int, height: int) -> tuple[Figure, Axes]:
    """A figure and axes that fill it: coordinates are pixels from its upper left corner."""
    sheet = figure(width, height)
    axes = sheet.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.set_autoscale_on(False)
    return sheet, axes


def text(axes: Axes, x: float, y: float, words: object, size: float = SMALL, **how) -> None:
    axes.text(x, y, str(words), size=size, zorder=4, **{"va": "center", "color": INK} | how)  # above cells and lines


def shorten(name: str, longest: int) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "\u2026"


def array(drawn: Figure) -> np.ndarray:
    """(H, W, 3) uint8 pixels."""
    drawn.canvas.draw()
    return np.asarray(drawn.canvas.buffer_rgba())[..., :3].copy()


def png(drawn: Figure, colors: int | None = None) -> bytes:
    """The figure as a PNG file.

    Args:
        colors: reduce to so many, at most 256: a third of the size, hardly to be seen at a card's size.
    """
    stream, picture = io.BytesIO(), Image.fromarray(array(drawn))
    if colors is not None:
        picture = picture.quantize(colors, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    picture.save(stream, "png", optimize=True)
    return stream.getvalue()


def write_png(writer: SummaryWriter, tag: str, png: bytes, step: int) -> None:
    """Add a PNG file's very bytes to a run's events; `SummaryWriter.add_image` takes pixels and encodes them anew."""
    width, height = Image.open(io.BytesIO(png)).size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def sequential(values: np.ndarray) -> np.ndarray:
    """(...) from 0 (white) to 1 (dark blue), clipped -> (..., 3) RGB in [0, 1]; NaN becomes EMPTY."""
    return _between(_SEQUENTIAL, np.asarray(values, float))


def diverging(values: np.ndarray) -> np.ndarray:
    """(...) from -1 (brown) over 0 (white) to 1 (blue), clipped -> (..., 3) RGB in [0, 1]; NaN as above."""
    return _between(_DIVERGING, (np.asarray(values, float) + 1) / 2)


def experts(count: int) -> np.ndarray:
    """(count, 3) RGB in [0, 1]: a color for each expert, the same whatever the count; repeated after 64."""
    return _palette()[np.arange(count) % MAX_EXPERTS]


def on(color: np.ndarray) -> str:
    """INK or white, whichever reads better on the color (RGB in [0, 1])."""
    luminance = _linear(np.asarray(color, float)) @ (0.2126, 0.7152, 0.0722)
    return INK if luminance > 0.2 else "white"


def _between(anchors: tuple[str, ...], values: np.ndarray) -> np.ndarray:
    place = np.nan_to_num(np.clip(values, 0, 1))
    colors = np.array([_rgb(anchor) for anchor in anchors])
    shown = np.stack([np.interp(place, np.linspace(0, 1, len(anchors)), c) for c in colors.T], -1)
    return np.where(np.isnan(values)[..., None], _rgb(EMPTY), shown)


def _rgb(text: str) -> np.ndarray:
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def _linear(colors: np.ndarray) -> np.ndarray:
    return np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)


@lru_cache
def _palette() -> np.ndarray:
    """(64, 3): the first seven as given, then always the one farthest from all before, for all three eyes."""
    steps = np.linspace(0, 1, 18)
    candidates = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    lightness, *tint = _perceived(candidates)[0].T
    # Apart from the words and from the paper, and none so loud that it draws the eye from the others.
    candidates = candidates[(lightness > 0.42) & (lightness < 0.9) & (np.hypot(*tint) < 0.17)]
    chosen = np.array([_rgb(text) for text in _FIRST])
    gray = np.array([[0.85] * 3, [0.95] * 3])  # of the dropped patches
    nearest = np.min([_apart(candidates, color) for color in [*chosen, *gray]], 0)
    while len(chosen) < MAX_EXPERTS:
        chosen = np.vstack([chosen, candidates[nearest.argmax()]])
        nearest = np.minimum(nearest, _apart(candidates, chosen[-1]))
    return chosen


def _apart(colors: np.ndarray, one: np.ndarray) -> np.ndarray:
    """(N, 3), (3,) -> (N,) distance for the eye that tells them apart worst."""
    return np.min(
        [np.linalg.norm(a - b, axis=1) for a, b in zip(_perceived(colors), _perceived(one[None]), strict=True)], 0
    )


def _perceived(colors: np.ndarray) -> list[np.ndarray]:
    """(N, 3) RGB -> (N, 3) Oklab (Ottosson 2020) as three kinds of eyes see them."""
    light = _linear(colors)
    found = []
    for eye in (np.eye(3), *map(np.array, _DEFICIENT)):
        cones = np.clip(light @ eye.T, 0, 1) @ np.array(
            [
                [0.4122214708, 0.2119034982, 0.0883024619],
                [0.5363325363, 0.6806995451, 0.2817188376],
                [0.0514459929, 0.1073969566, 0.6299787005],
            ]
        )
        found.append(
            np.cbrt(cones)
            @ np.array(
                [
                    [0.2104542553, 1.9779984951, 0.0259040371],
                    [0.7936177850, -2.4285922050, 0.7827717662],
                    [-0.0040720468, 0.4505937099, -0.8086757660],
                ]
            )
        )
    return found
