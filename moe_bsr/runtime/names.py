"""Names that people gave to folders and classes, made fit to be printed and drawn: as they are, and harmless.

A folder's name may hold any byte but / and NUL: terminal commands, line breaks, marks that turn the direction of
writing, bytes of another encoding. Identity is never decided on what these functions return.
"""

import unicodedata

UNREADABLE = "\N{REPLACEMENT CHARACTER}"
# Controls, invisible format marks (bidi overrides among them), line and paragraph separators.
ESCAPED = {"Cc", "Cf", "Zl", "Zp"}
JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"  # format marks too, but letters of some scripts need them


def printable(text: object) -> str:
    r"""The text on one line without anything that commands a terminal or turns the writing.

    Controls and marks that cannot be seen are escaped as in Python (`\x1b`, `\n`, `\u202e`), bytes that could not be
    decoded (surrogates) become U+FFFD. Everything else stays.
    """
    text = str(text)
    return text if text.isascii() and text.isprintable() else "".join(map(_printable_letter, text))


def _printable_letter(letter: str) -> str:
    category = unicodedata.category(letter)
    if category == "Cs":
        return UNREADABLE
    if category in ESCAPED and letter not in JOINERS:
        return letter.encode("unicode_escape").decode()
    return letter


def columns(text: str) -> int:
    """How many columns of a terminal the text takes: two for a wide letter (Chinese, Japanese, Korean), else one."""
    return sum(
        0 if unicodedata.combining(letter) or letter in JOINERS else 2 if _is_wide(letter) else 1 for letter in text
    )


def pad(text: str, width: int, right: bool = False) -> str:
    """The text with blanks after it (or before it, with `right`) up to so many columns."""
    blanks = " " * (width - columns(text))
    return blanks + text if right else text + blanks


def shorten(text: str, width: int) -> str:
    """The beginning of the text, in at most so many columns; an ellipsis says that there was more."""
    if columns(text) <= width:
        return text
    kept = ""
    for letter in text:
        if columns(kept + letter) > width - 1:
            break
        kept += letter
    return kept + "\N{HORIZONTAL ELLIPSIS}"


def _is_wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF"
