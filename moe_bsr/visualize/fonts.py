"""Choose the fonts of a text: DejaVu Sans, and for characters it lacks, the first font of this machine that has them.

A character that no font has is drawn as a box. matplotlib would warn about each of these.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from moe_bsr.runtime.names import printable

BASE = "DejaVu Sans"  # comes with matplotlib
BOX = "\N{WHITE SQUARE}"


def drawable(content: object) -> tuple[str, list[str]]:
    """Return a text as it can be drawn on one line, and the font families to draw it with."""
    text, families = printable(content), [BASE]
    for letter in set(text) - _of_base():
        if (family := _family_with(letter)) is None:
            text = text.replace(letter, BOX)
        elif family not in families:
            families.append(family)
    return text, families


@cache
def _of_base() -> frozenset[str]:
    from matplotlib import font_manager

    return _letters(font_manager.findfont(BASE))


@cache
def _family_with(letter: str) -> str | None:
    """Return the family of a font of this machine that has the character, preferably upright and of regular weight."""
    for font in sorted(_installed(), key=lambda font: (font.style != "normal", font.weight != 400, font.name)):
        if letter in _letters(font.fname):
            return font.name
    return None


def _installed() -> Iterable:
    """Return matplotlib's list of fonts without its own ones, which are for formulas, and without color emoji."""
    from matplotlib import font_manager, get_data_path

    own = Path(get_data_path())
    return (
        font
        for font in font_manager.fontManager.ttflist
        if own not in Path(font.fname).parents and "Emoji" not in font.name
    )


@cache
def _letters(file: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):  # removed since the list was made, or not a font
        return frozenset()
