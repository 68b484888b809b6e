"""What a process of our own does with its streams: a terminal that is gone or cannot show a letter ends no work.

Called once, at a program's start; a library that did this would change the program it is used in.
"""

import contextlib
import os
import sys
import threading
import warnings
from typing import Any

from moe_bsr.runtime.heard import is_heard


class Quiet:
    """A stream on which writing never fails: what cannot be written is lost."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def set_up(prog: str, quiet_output: bool) -> None:
    """Prepare stdout, stderr, warnings and what threads say.

    Args:
        prog: named in warnings. quiet_output: whether stdout may go quiet too; not where it carries the result.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed; the next file opened would get its number, and what is printed
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if number == 0 else "w"))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = Quiet(sys.stderr)
    if quiet_output:
        sys.stdout = Quiet(sys.stdout)

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if not is_heard():
            return
        print(f"{prog}: warning: {' '.join(str(message).split())}", file=file or sys.stderr)

    def of_thread(arguments: Any) -> None:
        if not isinstance(arguments.exc_value, OSError):  # whoever waits for the thread says it
            threading.__excepthook__(arguments)

    warnings.showwarning, threading.excepthook = show, of_thread


def finish() -> str | None:
    """Write out what is left for stdout; returns why that was not possible, and then nothing fails at exit."""
    try:
        sys.stdout.flush()
        return None
    except BrokenPipeError:
        failed = ""
    except OSError as error:
        failed = f"stdout: {error.strerror}"
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return failed
