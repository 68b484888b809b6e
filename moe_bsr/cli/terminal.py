"""Printing: what holds names that people gave is printed as it is on any terminal, and commands none."""

import sys

from moe_bsr.runtime.names import printable


def say(text: object = "", error: bool = False) -> None:
    """Print lines of text, on stderr with `error`."""
    print("\n".join(map(printable, str(text).split("\n"))), file=sys.stderr if error else sys.stdout)


def replace_what_cannot_be_shown() -> None:
    """In this process: a letter that a terminal or file does not have is printed as its escape, and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stream put there by somebody else may be anything, or none
            stream.reconfigure(errors="backslashreplace")
