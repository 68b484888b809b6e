"""Background threads for slow reads from disks and networks, so that training does not wait for them.

They are daemon threads. They end with the process, even in the middle of a request, so a slow server does not delay the
end of a run.
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

AHEAD_BYTES = 2**28  # limit of the images that are fetched in advance


def submit(work: Callable[..., Value], *arguments: Any) -> "Future[Value]":
    """Start `work(*arguments)` in one of the threads, and return its future."""
    future: Future[Value] = Future()
    _threads(os.getpid()).put((future, work, arguments))
    return future


def in_threads(work: Callable[[Item], Value], items: Iterable[Item]) -> list[Value]:
    """Return `work(item)` for every shard, computed in several threads, with a progress bar.

    Raises:
        Exception: the first error of `work`.
    """
    waiting = [submit(work, item) for item in items]
    try:
        shown = tqdm(waiting, unit="shard", leave=False, delay=2, disable=None if is_heard() else True)
        return [future.result() for future in shown]
    finally:
        for future in waiting:
            future.cancel()


@cache
def _threads(process: int) -> SimpleQueue:
    """Start the threads of this process and return their queue. `process` is a key only: a fork needs new threads."""
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
        del future, work, arguments  # else the thread would hold the result until the next request


class ReadAhead:
    """Images that are fetched before they are needed.

    Args:
        fetch: returns the bytes of the image with an index; called from several threads.
        sizes: number of bytes of each image, by index.
    """

    def __init__(self, fetch: Callable[[int], bytes], sizes: Any) -> None:
        self._fetch, self._sizes = fetch, sizes
        self._coming: dict[int, Future[bytes]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def expect(self, places: Iterable[int]) -> None:
        """Start to fetch these images. Beyond `AHEAD_BYTES` the oldest ones are dropped."""
        with self._lock:
            for place in places:
                if place not in self._coming:
                    self._coming[place] = submit(self._fetch, place)
                    self._bytes += int(self._sizes[place])
                while self._bytes > AHEAD_BYTES and len(self._coming) > 1:
                    self._forget(next(iter(self._coming))).cancel()

    def take(self, place: int) -> bytes:
        """Return the bytes of one image: wait for its fetch, or fetch it now if it was not expected."""
        with self._lock:
            future = self._forget(place) if place in self._coming else None
        if future is None or future.cancelled():
            return self._fetch(place)
        return future.result()

    def _forget(self, place: int) -> "Future[bytes]":
        self._bytes -= int(self._sizes[place])
        return self._coming.pop(place)
