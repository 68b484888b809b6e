"""Input pipeline of the trainer: prefetched batches, and micro-batches prepared for the forward pass."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from moe_bsr.data import ImageTransforms, Loader, TaskData, UnreadableImage
from moe_bsr.data.loader import Batch
from moe_bsr.runtime.device import Runtime


class Inputs:
    """Images of the tasks' training splits. `feature_cache.CachedInputs` provides cached features instead."""

    def __init__(
        self, tasks: dict[str, TaskData], transforms: ImageTransforms, runtime: Runtime, prefetch: int = 0
    ) -> None:
        self.tasks, self.transforms, self.runtime, self.prefetch = tasks, transforms, runtime, prefetch

    def batches(self, plan: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> Iterator[Batch]:
        """Return the batches of a plan (see `Loader`), on the CPU. Close the iterator when done."""
        return iter(Loader(self.tasks, self.transforms, plan, self.prefetch))

    def prepare(self, batch: Batch) -> Batch:
        """Return a batch, or a part of one, on the device and with normalized images."""
        device = self.runtime.device
        return dataclasses.replace(
            batch, images=self.transforms.normalize(batch.images, device=device), labels=batch.labels.to(device)
        )

    def cached_bytes(self) -> int:
        """Return the most bytes that cached inputs will take in memory."""
        return min(self._decoded_bytes(), int(self.transforms.cache_mb * 1e6))

    def keeps_all(self) -> bool:
        """Return whether every training image is decoded only once."""
        return self._decoded_bytes() <= self.transforms.cache_mb * 1e6

    def new_epochs(self) -> int:
        """Return the number of epochs in which new views come, if everything is cached."""
        return 1

    def _decoded_bytes(self) -> int:
        """Estimate the bytes of all decoded training and validation images from the first image of each task."""
        total = 0
        for data in self.tasks.values():
            with contextlib.suppress(UnreadableImage):  # reported when its batch is loaded
                first = data.train.source.image(int(data.train.index[0]))
                total += (len(data.train) + len(data.val)) * first.nbytes
        return total

    def summary(self) -> list[str]:
        """Return lines about the inputs for the start of the run."""
        return []
