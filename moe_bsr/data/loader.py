"""Make batches in the order of a plan: when they are needed, or some batches ahead in a background thread.

One thread is used and no processes. Decoding, resizing and copying release the interpreter lock, all images share one
cache, and nothing has to be sent between processes. The thread limits torch to one compute thread, because a second
pool of spinning compute threads slows down the first many times.
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

AHEAD = 256  # a source that reads from a network is told about this many images in advance, at least about one batch


@dataclass(slots=True)
class Batch:
    """One batch of one task.

    Attributes:
        positions: int64 (B,), positions of the images in the task's training split. They differ from the plan's where
            an unreadable image was skipped (`ImageTransforms.taken`).
        images: uint8 (B, 3, S, S); None if the features of all these images are cached.
        labels: int64 (B,).
        views: int64 (B,), the augmented view that each image shows (`ImageTransforms.views_of`).
        features: output of the frozen blocks, for a model that starts after them; None from the loader.
        targets: float32 (B, classes), mixed labels (mixup, CutMix), used in place of `labels`; None from the loader.
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
    """Iterable over the batches of a plan.

    Args:
        plan: yields (task, positions (B,), epochs (B,)).
        prefetch: number of batches to make in advance, in a thread; 0 makes each when it is needed. The batches are
            the same for every value. An exception in the thread is raised when its batch is requested.
        known: `known(task, positions, views)` returns whether the features of all these images are cached. Then the
            images are not decoded, and the batch's `images` is None.
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
            raise ValueError(f"prefetch: {prefetch} is below 0 (0: no batch is made in advance)")
        self.tasks = tasks
        self.transforms = transforms
        self.plan = plan
        self.prefetch = prefetch
        self.known = known

    def __iter__(self) -> Iterator[Batch]:
        return self._ahead() if self.prefetch else self._batches()

    def _announced(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield the plan. Sources that fetch images from a network are told about the next `AHEAD` images."""
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
        for task, positions, epochs in self._announced():
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
        slots = threading.Semaphore(self.prefetch)
        running, stopped = threading.Event(), threading.Event()

        def work() -> None:
            torch.set_num_threads(1)
            running.set()
            batches = self._batches()
            try:
                while slots.acquire() and not stopped.is_set():
                    ready.put(batch := next(batches, None))
                    if batch is None:
                        return
            except BaseException as error:
                ready.put(error)

        threads = torch.get_num_threads()
        worker = threading.Thread(target=work, name="loader", daemon=True)
        worker.start()
        running.wait()
        torch.set_num_threads(threads)  # the worker's call also changed the default of threads that start later
        try:
            while (batch := ready.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                slots.release()
                yield batch
        finally:
            stopped.set()
            slots.release()
            worker.join()
