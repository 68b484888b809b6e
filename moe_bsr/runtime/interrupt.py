"""Stopping on SIGINT, SIGTERM, SIGHUP, SIGXCPU, SIGUSR1 and SIGUSR2 where nothing is lost.

While training changes state a signal is only noted, and the loop ends after the update. Where no state
changes (an evaluation) it ends the work at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C, a polite kill, a terminal that closes, processor time used up, and a scheduler's warning that the time is
# nearly up (Slurm's --signal=USR1@90). Not all of them are everywhere.
STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
_OTHERS = {getattr(signal, name, None) for name in ("SIGUSR1", "SIGUSR2")}


class Interrupted(Exception):
    """A signal ended work inside `StopSignals.at_once`."""


class RankLost(RuntimeError):
    """Another process of this run has ended or does not answer; the message says which, and why if that is known."""


class StopSignals:
    """Catches `STOPPING` while it is entered as a context manager; the old handlers come back after it.

    A SIGHUP that is ignored already stays so (`nohup`), and so does a SIGUSR1 or SIGUSR2 that the program around
    handles itself (submitit). In another thread than the main one it catches nothing:
    Python allows no handlers there. After `RankLost` it catches on: a launcher now ends all processes of the run, and
    this one still has to save and to tell.

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
                if (number != hangup or signal.getsignal(number) is not signal.SIG_IGN)
                and (number not in _OTHERS or signal.getsignal(number) is signal.SIG_DFL)
            }
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and issubclass(kind, RankLost):
            return
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
