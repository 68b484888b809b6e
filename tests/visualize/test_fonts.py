"""Names in figures are drawn literally, without formulas and without warnings."""

import warnings

import numpy as np
import pytest
from tiny_names import AWKWARD

from moe_bsr.visualize import fonts, theme
from moe_bsr.visualize.tokens import TokenTrace, View, strip


def drawn(*names: str) -> np.ndarray:
    _, axes = theme.canvas(400, 40 * len(names))
    for row, name in enumerate(names):
        theme.text(axes, 5, 20 + 40 * row, name)
    return theme.pixels(axes.figure)


@pytest.mark.parametrize("name", AWKWARD.values(), ids=AWKWARD)
def test_any_name_is_drawn_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = drawn(name)
        view = View(np.zeros((3, 8, 8), np.uint8), (2, 2), name, name, TokenTrace())
        theme.png(strip("task", [view]))
    assert (pixels < 255).any() == bool(name)


def test_dollar_signs_do_not_start_formulas():
    both = drawn("a$b$c")
    assert not np.array_equal(both, drawn("abc")) and not np.array_equal(both, drawn("a b c"))
    assert (drawn("$$") < 255).sum() > 1.5 * (drawn("$") < 255).sum()


def test_letters_missing_in_the_font_use_another_font_or_a_box(monkeypatch):
    monkeypatch.setattr(fonts, "_family_with", {"日": "Some CJK"}.get)
    assert fonts.drawable("a日本") == ("a日" + fonts.BOX, [fonts.BASE, "Some CJK"])
    assert fonts.drawable("été") == ("été", [fonts.BASE])


def test_an_installed_font_is_found_by_its_letters(monkeypatch):
    from matplotlib import font_manager

    base = font_manager.findfont(fonts.BASE)
    entry = font_manager.FontEntry(fname=base, name="Installed", style="normal", weight=400)
    gone = font_manager.FontEntry(fname="/nowhere.ttf", name="Gone", style="normal", weight=400)
    monkeypatch.setattr(fonts, "_installed", lambda: [gone, entry])
    fonts._family_with.cache_clear()
    assert fonts._family_with("é") == "Installed" and fonts._family_with("日") is None
    fonts._family_with.cache_clear()


def test_long_names_are_cut_by_their_drawn_width():
    wide, narrow = theme.shorten("日" * 300, 24), theme.shorten("x" * 300, 24)
    assert len(wide) == 12 and len(narrow) == 24
