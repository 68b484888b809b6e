"""The common style of all pictures: sizes, colors, and how a figure becomes pixels.

Figures are drawn dark on white, at twice the width of TensorBoard's cards. Units are pixels: a font size of 17 is 17
pixels high. Color is never the only carrier of a meaning; numbers or labels stand beside it. matplotlib is imported by
the first call that draws. pyplot is never imported.
"""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moe_bsr.runtime import names
from moe_bsr.visualize.fonts import BASE, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 760  # pixels
HEADING, LABEL, SMALL, TINY = 25, 19, 17, 12  # font sizes in pixels
INK, MUTED, FAINT = "#1a1a1a", "#595959", "#d9d9d9"  # text, less important text, lines
EMPTY = "#f0f0f0"  # cells without data
WRONG = "#b3261e"

# White to dark blue. Lightness falls steadily, so steps are equal in gray print and for every kind of color vision.
_SEQUENTIAL = ("#ffffff", "#dbe9f4", "#b0d2e7", "#78b3d6", "#4590c0", "#2169a8", "#10467f", "#08264d")
_REDDISH = ("#ffffff", "#fbe3dd", "#f6b9ac", "#ea8573", "#d65443", "#b3261e", "#7f1310", "#4a0604")
# Brown below zero, white at zero, blue above; equally dark on both sides.
_DIVERGING = ("#53300a", "#95591a", "#c28f4c", "#ecd3a8", "#ffffff", "#b9d7ea", "#5f9fcc", "#2169a8", "#0b3766")
# Colors of the experts: the seven of Okabe and Ito (2008, without black), then each time the color farthest from all
# before it, for normal, protanopic and deuteranopic vision. `python tests/color_vision.py` prints them.
_EXPERTS = """
    #0072b2 #e69f00 #009e73 #cc79a7 #56b4e9 #d55e00 #f0e442 #960f00
    #4b4b69 #5a87f0 #96c396 #3c3ca5 #696969 #b43c00 #d2e196 #5ad2ff
    #960f4b #e1c35a #6996d2 #695a87 #5ac3c3 #4bb478 #d2873c #a52d3c
    #787887 #2da5ff #3c875a #692d87 #4b78d2 #3c5ac3 #b4d2b4 #0ff0ff
    #c35a4b #4b87c3 #a5d287 #b4b45a #694b96 #a54ba5 #ff96c3 #5a5a69
    #f0d269 #e187a5 #c34b00 #b469a5 #96d2e1 #5aa55a #5ac3e1 #c37887
    #a52d00 #f0b400 #4bc3ff #d29687 #4b69d2 #c3e1b4 #965a3c #b496c3
    #e1d22d #0f5a4b #3c4bb4 #696987 #d29600 #d27800 #784b2d #a5c378
""".split()
MAX_EXPERTS = len(_EXPERTS)  # experts that have different colors

# Arguments of the calls of `number`, by figure. Pillow draws them.
_numbers: WeakKeyDictionary[Figure, list[tuple[float, float, str, float, str, bool]]] = WeakKeyDictionary()


def figure(width: int, height: int) -> Figure:
    """Return an empty white figure of this size in pixels. A font size or line width of 1 is one pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="white")
    FigureCanvasAgg(empty)
    return empty


def canvas(width: int, height: int) -> tuple[Figure, Axes]:
    """Return a figure, and axes that fill it. Coordinates are pixels from the upper left corner."""
    whole = figure(width, height)
    axes = whole.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.set_autoscale_on(False)
    return whole, axes


def text(axes: Axes, x: float, y: float, content: object, size: float = SMALL, **how) -> None:
    """Write a text on one line, as it is: it is not read as a formula, and missing characters become boxes."""
    words, families = drawable(content)
    style = {"va": "center", "color": INK, "size": size, "zorder": 4} | how  # above cells and lines
    axes.text(x, y, words, family=families, parse_math=False, usetex=False, **style)


def number(axes: Axes, x: float, y: float, digits: str, size: float, color: str, bold: bool = False) -> None:
    """Write a number centered at (x, y). Hundreds of them take a tenth of the time of `text`."""
    _numbers.setdefault(axes.figure, []).append((x, y, digits, size, color, bold))


def numbers(drawn: Figure) -> list[str]:
    """Return the texts that `number` was given for a figure."""
    return [digits for _, _, digits, *_ in _numbers.get(drawn, ())]


def shorten(name: str, width: int) -> str:
    """Shorten a name to `width` columns; a wide letter takes two."""
    return names.shorten(names.printable(name), width)


def pixels(drawn: Figure) -> np.ndarray:
    """Draw a figure as (H, W, 3) uint8 pixels."""
    drawn.canvas.draw()
    image = Image.fromarray(np.asarray(drawn.canvas.buffer_rgba())[..., :3])
    pen = ImageDraw.Draw(image)
    for x, y, digits, size, color, bold in _numbers.get(drawn, ()):
        pen.text((x, y), digits, fill=color, font=_number_font(round(size), bold), anchor="mm")
    return np.array(image)


@cache
def _number_font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    from matplotlib import font_manager

    weight = "bold" if bold else "normal"
    return ImageFont.truetype(font_manager.findfont(font_manager.FontProperties(family=BASE, weight=weight)), size)


def png(drawn: Figure, colors: int | None = None) -> bytes:
    """Return the figure as a PNG file.

    Args:
        colors: reduce to this number of colors, at most 256. This takes a third of the bytes, and is hardly visible at
            the size of TensorBoard's cards. None keeps all colors.
    """
    stream, picture = io.BytesIO(), Image.fromarray(pixels(drawn))
    if colors is not None:
        # The octree takes a tenth of the time of the median cut.
        picture = picture.quantize(colors, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    picture.save(stream, "png")
    return stream.getvalue()


def sequential(values: np.ndarray) -> np.ndarray:
    """Map values (...) from 0 (white) to 1 (dark blue), clipped, to (..., 3) RGB in [0, 1]; NaN becomes EMPTY."""
    return _between(_SEQUENTIAL, np.asarray(values, float))


def reddish(values: np.ndarray) -> np.ndarray:
    """Map values like `sequential`, but from white to dark red, for mistakes."""
    return _between(_REDDISH, np.asarray(values, float))


def diverging(values: np.ndarray) -> np.ndarray:
    """Map values (...) from -1 (brown) over 0 (white) to 1 (blue), clipped, to (..., 3) RGB in [0, 1]; NaN: EMPTY."""
    return _between(_DIVERGING, (np.asarray(values, float) + 1) / 2)


def expert_colors(count: int) -> np.ndarray:
    """Return (count, 3) RGB in [0, 1]: a color for each expert, which does not depend on `count`; repeated after 64."""
    return np.array([_rgb(_EXPERTS[expert % MAX_EXPERTS]) for expert in range(count)]).reshape(-1, 3)


def text_color_on(color: np.ndarray) -> str:
    """Return INK or white, whichever is more legible on the color (RGB in [0, 1])."""
    luminance = _linear(np.asarray(color, float)) @ (0.2126, 0.7152, 0.0722)
    return INK if luminance > 0.2 else "white"


def _between(anchors: tuple[str, ...], values: np.ndarray) -> np.ndarray:
    position = np.nan_to_num(np.clip(values, 0, 1))
    colors = np.array([_rgb(anchor) for anchor in anchors])
    blended = np.stack([np.interp(position, np.linspace(0, 1, len(anchors)), c) for c in colors.T], -1)
    return np.where(np.isnan(values)[..., None], _rgb(EMPTY), blended)


def _rgb(text: str) -> np.ndarray:
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def _linear(colors: np.ndarray) -> np.ndarray:
    return np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
