"""Printing: what holds names that people gave is printed as it is on any terminal, and commands none."""

import sys

from moe_bsr.runtime.heard import is_heard
from moe_bsr.runtime.names import printable


def say(text: object = "", error: bool = False) -> None:
    """Print lines of text, on stderr with `error`; of several processes the first one does."""
    if not is_heard():
        return
    print("\n".join(map(printable, str(text).split("\n"))), file=sys.stderr if error else sys.stdout)
