"""Mixup and cutmix by timm's code: two images of a task in one, and their labels in the same shares.

Mixup (Zhang et al. 2018) averages pixels, cutmix (Yun et al. 2019) pastes a rectangle; where both are asked for, a coin
decides for each micro-batch. What is mixed is a function of the seed, the update and the micro-batch.
"""

import dataclasses

from timm.data.mixup import Mixup

from moe_bsr.config import TrainConfig
from moe_bsr.data.augment import seeded
from moe_bsr.data.loader import Batch
from moe_bsr.runtime.rng import key, stream


class Mixing:
    """Mixes the images of micro-batches, each with the one as far from the end as it is from the start."""

    def __init__(self, config: TrainConfig, classes: dict[str, int]) -> None:
        """
        Args:
            classes: number of classes by task.
        """
        self._of_task = {
            task: Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=count)
            for task, count in classes.items()
        }

    def __call__(self, batch: Batch, noise_key: tuple[int, ...]) -> Batch:
        """A prepared micro-batch of even size with mixed images (changed in place) and `targets`.

        Its `labels` are those with the larger shares.

        Args:
            noise_key: integers that seed the mixture.
        """
        with seeded(stream(key("mixing", *noise_key))):
            images, targets = self._of_task[batch.task](batch.images, batch.labels)
        return dataclasses.replace(batch, images=images, labels=targets.argmax(1), targets=targets)
