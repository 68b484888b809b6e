"""Mixup and cutmix with timm's code: mix pairs of images of a task, and their labels in the same proportion.

Mixup (Zhang et al. 2018) averages pixels, and cutmix (Yun et al. 2019) pastes a rectangle. If both are on, one of them
is drawn at random for each micro-batch. The mixture depends on the seed, the update and the micro-batch only.
"""

import dataclasses

from timm.data.mixup import Mixup

from moe_bsr.config import TrainConfig
from moe_bsr.data.augment import seeded
from moe_bsr.data.loader import Batch
from moe_bsr.runtime.rng import key, stream


class Mixing:
    """Mixes the images of a micro-batch: image i with image B - 1 - i."""

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
        """Return the micro-batch with mixed images (changed in place) and `targets` (B, C).

        Each entry of `labels` becomes the class with the larger share.

        Args:
            batch: a prepared micro-batch of even size.
            noise_key: integers that seed the mixture.
        """
        with seeded(stream(key("mixing", *noise_key))):
            images, targets = self._of_task[batch.task](batch.images, batch.labels)
        return dataclasses.replace(batch, images=images, labels=targets.argmax(1), targets=targets)
