"""Print text that contains names given by users, such that any terminal shows it and none is controlled by it."""

import sys

from moe_bsr.runtime.heard import is_heard
from moe_bsr.runtime.names import printable


def say(text: object = "", error: bool = False) -> None:
    """Print lines of text, to stderr if `error`. Of several processes of a run only the first prints."""
    if not is_heard():
        return
    print("\n".join(map(printable, str(text).split("\n"))), file=sys.stderr if error else sys.stdout)
