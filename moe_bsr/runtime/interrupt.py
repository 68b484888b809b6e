"""SIGINT and SIGTERM as a wish to stop: noted while training state changes, raised at once where it does not."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """A signal arrived where work may simply be left."""


class StopSignals:
    """Use as a context manager around the whole run.

    Attributes:
        number: of the signal that arrived, 0 as long as none has.
    """

    def __init__(self) -> None:
        self.number = 0
        self._at_once = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal (also one noted before) raises Interrupted: for work that changes nothing."""
        self._at_once = True
        try:
            if self.number:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        if self._at_once:
            self._at_once = False
            raise Interrupted
