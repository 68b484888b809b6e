"""What the trainer feeds to a model: whole batches, drawn ahead, and micro-batches ready for the forward pass."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from moe_bsr.data import ImageTransforms, Loader, TaskData, UnreadableImage
from moe_bsr.data.loader import Batch
from moe_bsr.runtime.device import Runtime


class Inputs:
    """Images of the tasks' training splits. (`feature_cache.CachedInputs` feeds what frozen blocks make of them.)"""

    def __init__(
        self, tasks: dict[str, TaskData], transforms: ImageTransforms, runtime: Runtime, prefetch: int = 0
    ) -> None:
        self.tasks, self.transforms, self.runtime, self.prefetch = tasks, transforms, runtime, prefetch

    def batches(self, plan: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> Iterator[Batch]:
        """The batches of a plan (see `Loader`), on the CPU; close the iterator when done."""
        return iter(Loader(self.tasks, self.transforms, plan, self.prefetch))

    def prepare(self, batch: Batch) -> Batch:
        """A batch or a part of one as the model takes it: on the device, images normalized."""
        device = self.runtime.device
        return dataclasses.replace(
            batch, images=self.transforms.normalize(batch.images, device=device), labels=batch.labels.to(device)
        )

    def cached_bytes(self) -> int:
        """What decoded images will take in memory at most."""
        return min(self._decoded_bytes(), int(self.transforms.cache_mb * 1e6))

    def keeps_all(self) -> bool:
        """Whether no training image is decoded a second time."""
        return self._decoded_bytes() <= self.transforms.cache_mb * 1e6

    def new_epochs(self) -> int:
        """For how many epochs images come that were not seen in that form before, where all is kept."""
        return 1

    def _decoded_bytes(self) -> int:
        """Of all training and validation images, judged by the first image of each task."""
        total = 0
        for data in self.tasks.values():
            with contextlib.suppress(UnreadableImage):  # named when its batch is asked for
                first = data.train.source.image(int(data.train.index[0]))
                total += (len(data.train) + len(data.val)) * first.nbytes
        return total

    def summary(self) -> list[str]:
        """Lines for a person who starts the run."""
        return []
