"""Names of classes and of splits as people write them: which are the same, and which look alike.

Unicode has several forms of one text, and a Mac's file system writes another one than the rest: names are compared,
and kept, in form NFC.
"""

import unicodedata
from collections.abc import Sequence

_KINDS = "case, spaces, final dots or unseen characters"

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}

# What people call a column, or a field, of labels, the likeliest first.
LABEL_COLUMNS = ("label", "class", "category", "target", "class_name", "label_name", "species", "breed", "y")


def composed(name: str) -> str:
    """The name in form NFC."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def split_named(name: str) -> str | None:
    """Which of train, val and test is meant by a name such as "Validation", or none of them."""
    folded = name.strip().casefold()
    return next((split for split, names in SPLIT_NAMES.items() if folded in names), None)


def look_alikes(names: Sequence[str]) -> list[str]:
    """A line for each name that differs from an earlier one in case, spaces or unseen characters alone."""
    seen: dict[str, str] = {}
    lines = []
    for name in names:
        first = seen.setdefault(_folded(name), name)
        if first != name:
            lines.append(f"classes {first!r} and {name!r} are two, but differ only in {_KINDS}: rename one")
    return lines


def unknown_class(name: str, known: Sequence[str], where: str) -> ValueError:
    """What to raise for a class that has no training images; `where` it was found."""
    near = next((each for each in known if _folded(each) == _folded(name)), None)
    what = f"{where}: class {name!r} is not among the {len(known)} classes of the training images"
    if near is not None:
        return ValueError(f"{what}, but differs from {near!r} only in {_KINDS}: rename it")
    return ValueError(f"{what}; add training images for it, or take it out of there")


def _folded(name: str) -> str:
    """Equal for names that a person would take for one."""
    seen = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", seen).casefold().replace("_", " ").split()).rstrip(". ")
