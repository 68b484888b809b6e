"""Make names of folders and classes safe to print and draw, and change them no more than needed.

A folder's name may hold any byte but / and NUL: terminal commands, line breaks, marks that change the writing
direction, bytes of another encoding. Never compare names by what these functions return: two names may look alike.
"""

import unicodedata

UNREADABLE = "\N{REPLACEMENT CHARACTER}"
# Unicode categories: controls, invisible format marks (also bidi overrides), line and paragraph separators.
ESCAPED = {"Cc", "Cf", "Zl", "Zp"}
JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"  # format marks that some scripts need; they are kept


def printable(text: object) -> str:
    r"""Return the text on one line, without terminal commands and marks that change the writing direction.

    Controls and invisible marks are escaped as in Python (`\x1b`, `\n`, `\u202e`). Bytes that could not be decoded
    (surrogates) become U+FFFD. Everything else stays.
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
    """Return the text's width in terminal columns: two for a wide letter (Chinese, Japanese, Korean), else one."""
    return sum(
        0 if unicodedata.combining(letter) or letter in JOINERS else 2 if _is_wide(letter) else 1 for letter in text
    )


def pad(text: str, width: int, right: bool = False) -> str:
    """Pad the text with blanks to a width in columns: at its end, or with `right` at its beginning."""
    blanks = " " * (width - columns(text))
    return blanks + text if right else text + blanks


def shorten(text: str, width: int) -> str:
    """Cut the text to a width in columns. An ellipsis marks a cut."""
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
