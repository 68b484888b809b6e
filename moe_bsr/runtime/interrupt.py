"""Stopping on SIGINT, SIGTERM, SIGHUP and SIGXCPU where nothing is lost.

While training changes state a signal is only noted, and the loop ends after the update. Where no state
changes (an evaluation) it ends the work at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C, a polite kill, a terminal that closes, processor time used up; the last two are not everywhere.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU") if hasattr(signal, name)]


class Interrupted(Exception):
    """A signal ended work inside `StopSignals.at_once`."""


class StopSignals:
    """Catches `STOPPING` while it is entered as a context manager; the old handlers come back after it.

    A SIGHUP that is ignored already stays so (`nohup`). In another thread than the main one it catches nothing:
    Python allows no handlers there.

    Attributes:
        number: of the signal that arrived, 0 as long as none has.
    """

    def __init__(self) -> None:
        self.number = 0
        self._at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            hangup = getattr(signal, "SIGHUP", None)
            self._previous = {
                number: signal.signal(number, self._on_signal)
                for number in STOPPING
                if number != hangup or signal.getsignal(number) is not signal.SIG_IGN
            }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal (also one that came before) raises Interrupted: for work that changes no state."""
        self._at_once = True
        try:
            if self.number:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def _on_signal(self, number: int, frame: object) -> None:
        self.number = number
        if self._at_once:
            self._at_once = False
            raise Interrupted
