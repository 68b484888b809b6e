"""Batches in the order of a plan, made in process or some ahead in one background thread.

A thread and not processes: decoding, resizing and copying release the interpreter lock, the cache
stays in one place, and nothing is sent between processes. It runs torch on a single thread, for a
second team of spinning compute threads slows the first one down many times.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from moe_bsr.data.task import TaskData
from moe_bsr.data.transforms import ImageTransforms

AHEAD = 256  # images that a source is told of before they are asked for, or a batch


@dataclass(slots=True)
class Batch:
    """One batch of one task.

    Attributes:
        positions: int64 (B,), which images these are, as positions in the task's training split: not those of the
            plan where an image that cannot be read was skipped (`ImageTransforms.taken`).
        images: uint8 (B, 3, S, S); None when the features of all these images are cached.
        views: int64 (B,), which of an image's augmented views each is (`ImageTransforms.views_of`).
        labels: int64 (B,).
        targets: float32 (B, classes), the shares of mixed labels, in place of `labels`; None from the loader.
        features: what the frozen blocks make of the images, for a model that starts after them; None from the loader.
    """

    task: str
    positions: np.ndarray
    images: torch.Tensor | None
    labels: torch.Tensor
    views: np.ndarray | None = None
    features: Any = None
    targets: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


class Loader:
    """Iterates over the batches of a plan.

    `plan` yields (task, positions (B,), epochs (B,)); with `prefetch=n` it is read up to n batches
    ahead of what has been taken. The batches are the same for every `prefetch`. An exception made
    ahead is raised when its batch is asked for. `known(task, positions, views)` says that the features of all
    these are cached: the images are not decoded, and the batch's `images` is None.
    """

    def __init__(
        self,
        tasks: dict[str, TaskData],
        transforms: ImageTransforms,
        plan: Iterable[tuple[str, np.ndarray, np.ndarray]],
        prefetch: int = 0,
        known: Callable[[str, np.ndarray, np.ndarray], bool] | None = None,
    ):
        if prefetch < 0:
            raise ValueError(f"prefetch: {prefetch} is below 0 (0 is in process)")
        self.tasks = tasks
        self.transforms = transforms
        self.plan = plan
        self.prefetch = prefetch
        self.known = known

    def __iter__(self) -> Iterator[Batch]:
        return self._ahead() if self.prefetch else self._batches()

    def _told(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """The plan, of which sources that read from afar are told `AHEAD` images in advance."""
        if not any(hasattr(data.train.source, "expect") for data in self.tasks.values()):
            yield from self.plan
            return
        waiting: deque[tuple[str, np.ndarray, np.ndarray]] = deque()
        images = 0
        for task, positions, epochs in self.plan:
            if self.known is None or not self.known(task, positions, self.transforms.views_of(epochs)):
                self.transforms.expect(self.tasks[task].train, positions)
            waiting.append((task, positions, epochs))
            images += len(positions)
            while waiting and images - len(waiting[0][1]) >= AHEAD:
                images -= len(waiting[0][1])
                yield waiting.popleft()
        yield from waiting

    def _batches(self) -> Iterator[Batch]:
        for task, positions, epochs in self._told():
            data = self.tasks[task]
            positions, views = self.transforms.taken(data, positions), self.transforms.views_of(epochs)
            if self.known is not None and self.known(task, positions, views):
                images, labels = None, torch.from_numpy(data.train.labels[positions])
            else:
                images, labels = self.transforms.train_batch(data, positions, epochs)
                positions = self.transforms.taken(data, positions)
            yield Batch(task, positions, images, labels, views)

    def _ahead(self) -> Iterator[Batch]:
        ready: SimpleQueue = SimpleQueue()  # batches, then an exception or None
        room = threading.Semaphore(self.prefetch)
        running, stopped = threading.Event(), threading.Event()

        def work() -> None:
            torch.set_num_threads(1)
            running.set()
            batches = self._batches()
            try:
                while room.acquire() and not stopped.is_set():
                    ready.put(batch := next(batches, None))
                    if batch is None:
                        return
            except BaseException as error:
                ready.put(error)

        threads = torch.get_num_threads()
        worker = threading.Thread(target=work, name="loader", daemon=True)
        worker.start()
        running.wait()
        torch.set_num_threads(threads)  # the worker's call also set what later threads start with
        try:
            while (batch := ready.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                room.release()
                yield batch
        finally:
            stopped.set()
            room.release()
            worker.join()
