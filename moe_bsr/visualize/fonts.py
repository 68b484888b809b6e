"""Which fonts a text is drawn with: DejaVu Sans, and for letters it lacks the first font of this machine that has them.

A letter that no font has becomes a box, without a warning for each.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from moe_bsr.runtime.names import printable

BASE = "DejaVu Sans"  # comes with matplotlib
BOX = "\N{WHITE SQUARE}"


def drawable(content: object) -> tuple[str, list[str]]:
    """A text as it can be drawn on one line, and the font families to draw it with."""
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
    """The family of a font of this machine that has the letter; upright and of usual weight before others."""
    for font in sorted(_installed(), key=lambda font: (font.style != "normal", font.weight != 400, font.name)):
        if letter in _letters(font.fname):
            return font.name
    return None


def _installed() -> Iterable:
    """Entries of matplotlib's list but its own fonts, which are for formulas, and those of colored pictures."""
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
    except (OSError, RuntimeError):  # gone since the list was made, or no font
        return frozenset()
