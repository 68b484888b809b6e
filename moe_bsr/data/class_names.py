"""Compare names of classes and splits as people write them.

The same text can be encoded in Unicode in several ways, and macOS file systems use another form than most. So names are
compared and stored in Unicode form NFC.
"""

import unicodedata
from collections.abc import Sequence

_KINDS = "case, spaces, final dots or invisible characters"

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}

# Usual names of a column or field with labels, the most likely first.
LABEL_COLUMNS = ("label", "class", "category", "target", "class_name", "label_name", "species", "breed", "y")


def composed(name: str) -> str:
    """Return the name in Unicode form NFC."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def split_named(name: str) -> str | None:
    """Return which of train, val and test a name such as "Validation" means; None if it is none of them."""
    folded = name.strip().casefold()
    return next((split for split, names in SPLIT_NAMES.items() if folded in names), None)


def look_alikes(names: Sequence[str]) -> list[str]:
    """Return a warning for each name that looks like an earlier one: it differs only in `_KINDS`."""
    seen: dict[str, str] = {}
    lines = []
    for name in names:
        first = seen.setdefault(_folded(name), name)
        if first != name:
            lines.append(f"classes {first!r} and {name!r} count as two, but differ only in {_KINDS}: rename one")
    return lines


def unknown_class(name: str, known: Sequence[str], where: str) -> ValueError:
    """Return the error to raise for a class that has no training images. `where` says in which file or folder it is."""
    near = next((each for each in known if _folded(each) == _folded(name)), None)
    what = f"{where}: class {name!r} is not among the {len(known)} classes of the training images"
    if near is not None:
        return ValueError(f"{what}, but differs from {near!r} only in {_KINDS}: rename it")
    return ValueError(f"{what}; add training images for it, or remove it there")


def _folded(name: str) -> str:
    """Return a key that is equal for names that look the same."""
    seen = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", seen).casefold().replace("_", " ").split()).rstrip(". ")
