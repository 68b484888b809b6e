"""Threads that wait for disks and networks, so that the one which trains does not.

They end with the process, in the middle of a request if need be: whoever stops a run does not wait for a slow server.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

from tqdm import tqdm

from moe_bsr.data.addresses import CONNECTIONS
from moe_bsr.runtime.heard import is_heard

Item = TypeVar("Item")
Value = TypeVar("Value")

AHEAD_BYTES = 2**28  # of images that were fetched before they were asked for


def begun(work: Callable[..., Value], *arguments: Any) -> "Future[Value]":
    """What `work(*arguments)` will return, once one of the threads has come to it."""
    future: Future[Value] = Future()
    _threads(os.getpid()).put((future, work, arguments))
    return future


def all_of(work: Callable[[Item], Value], items: Iterable[Item], what: str) -> list[Value]:
    """`work` of every item, several at a time; a person is shown how far it is. The first error ends it.

    Args:
        what: an item is called.
    """
    waiting = [begun(work, item) for item in items]
    try:
        shown = tqdm(waiting, unit=what, leave=False, delay=2, disable=None if is_heard() else True)
        return [future.result() for future in shown]
    finally:
        for future in waiting:
            future.cancel()


@cache
def _threads(process: int) -> SimpleQueue:
    """What the threads of this process take their work from; a fork has none of its parent's."""
    work: SimpleQueue = SimpleQueue()
    for number in range(CONNECTIONS):
        threading.Thread(target=_run, args=(work,), name=f"fetch {number}", daemon=True).start()
    return work


def _run(queue: SimpleQueue) -> None:
    while True:
        future, work, arguments = queue.get()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work(*arguments))
            except BaseException as error:
                future.set_exception(error)
        del future, work, arguments  # what was fetched is not held until the next request


class ReadAhead:
    """What is going to be asked for, fetched before it is.

    Args:
        fetch: place -> bytes, in any thread. sizes: bytes by place.
    """

    def __init__(self, fetch: Callable[[int], bytes], sizes: Any) -> None:
        self._fetch, self._sizes = fetch, sizes
        self._coming: dict[int, Future[bytes]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def expect(self, places: Iterable[int]) -> None:
        """Begin to fetch these. If there is no room for all that was expected, the oldest is forgotten."""
        with self._lock:
            for place in places:
                if place not in self._coming:
                    self._coming[place] = begun(self._fetch, place)
                    self._bytes += int(self._sizes[place])
                while self._bytes > AHEAD_BYTES and len(self._coming) > 1:
                    self._forget(next(iter(self._coming))).cancel()

    def take(self, place: int) -> bytes:
        """The bytes of one; waited for, or fetched now if nobody said so before."""
        with self._lock:
            future = self._forget(place) if place in self._coming else None
        if future is None or future.cancelled():
            return self._fetch(place)
        return future.result()

    def _forget(self, place: int) -> "Future[bytes]":
        self._bytes -= int(self._sizes[place])
        return self._coming.pop(place)
