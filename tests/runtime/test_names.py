"""Names are printed unchanged if they are harmless, and escaped otherwise."""

import unicodedata

import pytest
from tiny_names import AWKWARD

from moe_bsr.runtime.names import columns, pad, printable, shorten


@pytest.mark.parametrize("name", AWKWARD.values(), ids=AWKWARD)
def test_a_printable_name_is_one_encodable_line_without_control_characters(name):
    shown = printable(name)
    assert len(shown.splitlines()) <= 1 and shown.encode("utf-8").decode() == shown
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs")]
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")


@pytest.mark.parametrize("kind", ["dollars", "broken formula", "accent", "wide letters", "markup", "emoji", "long"])
def test_harmless_names_are_unchanged(kind):
    assert printable(AWKWARD[kind]) == AWKWARD[kind]


def test_other_characters_are_escaped_as_in_python():
    assert printable("\x1b]0;x\x07") == r"\x1b]0;x\x07"
    assert printable("a\nb\tc") == r"a\nb\tc" and printable("a\u202eb") == r"a\u202eb"
    assert printable(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\ufffd"
    assert printable(7) == "7"


def test_wide_letters_take_two_columns_and_marks_none():
    assert columns("abc") == 3 and columns("日本 語") == 7 and columns("e\u0301") == 1
    assert pad("日本", 6) == "日本  " and pad("ab", 4, right=True) == "  ab"


@pytest.mark.parametrize("name", AWKWARD.values(), ids=AWKWARD)
def test_a_shortened_name_fits_and_keeps_its_start(name):
    short = shorten(name, 5)
    assert columns(short) <= 5 and name.startswith(short.removesuffix("\u2026"))
    assert (short == name) == (columns(name) <= 5)
