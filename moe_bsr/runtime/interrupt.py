"""Stop on SIGINT, SIGTERM, SIGHUP, SIGXCPU, SIGUSR1 or SIGUSR2 without losing work.

While training changes state, a signal is only recorded, and the training loop ends after the update. Where no state
changes (an evaluation), a signal ends the work at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C, `kill`, a closed terminal, CPU time used up, and a scheduler's warning that the time limit is near (Slurm's
# --signal=USR1@90). Some systems lack some of them.
STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
_OTHERS = {getattr(signal, name, None) for name in ("SIGUSR1", "SIGUSR2")}


class Interrupted(Exception):
    """Raised by a signal inside `StopSignals.at_once`."""


class RankLost(RuntimeError):
    """Another process of this run has ended or does not answer. The message says which, and why if that is known."""


class StopSignals:
    """Context manager that catches the signals `STOPPING`, and restores the previous handlers at its end.

    Exceptions: a SIGHUP that is already ignored stays ignored (`nohup`), and a SIGUSR1 or SIGUSR2 that the surrounding
    program handles is left to it (submitit). Outside the main thread no signal is caught, since Python allows no
    handlers there. After `RankLost` the handlers stay: the launcher now sends signals to all processes of the run, and
    this one still has to save and to print why it ends.

    Attributes:
        number: number of the last signal that arrived, 0 if there was none.
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
        """Context for work that changes no state. A signal, also an earlier one, raises Interrupted in it."""
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
