"""Set up the standard streams of a process, so that output problems do not end its work.

Examples are a terminal that has gone, and one that cannot show a character. Only a program of our own calls this, once
at its start: a library must not change the streams of the program that uses it.
"""

import contextlib
import os
import sys
import threading
import warnings
from typing import Any

from moe_bsr.runtime.heard import is_heard


class Quiet:
    """Stream on which writing never fails: text that cannot be written is lost."""

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
    """Set up stdout, stderr, warnings, and the reports of exceptions in threads.

    Args:
        prog: name of the program, for warnings.
        quiet_output: True if errors in writing to stdout are ignored too. False where stdout carries the result.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next opened file would get its number, and receive the output
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
        if not isinstance(arguments.exc_value, OSError):  # an OSError is reported by the code that joins the thread
            threading.__excepthook__(arguments)

    warnings.showwarning, threading.excepthook = show, of_thread


def finish() -> str | None:
    """Flush stdout, and keep a failure from being raised again at exit.

    Returns:
        None if all was written, "" if the reader has closed the pipe, else the error message.
    """
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
