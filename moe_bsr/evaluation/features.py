"""Compute the features of all images of a split in one pass."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.runtime.device import Runtime


class Features(NamedTuple):
    """Features of the N readable images of a split, in its order, on the CPU.

    Attributes:
        x: (N, ...) float32. labels: (N,) int64.
    """

    x: Tensor
    labels: Tensor

    def checked(self, task: str) -> "Features":
        """Return these features unchanged.

        Raises:
            FloatingPointError: one is NaN or infinite.
        """
        if not self.x.isfinite().all():
            raise FloatingPointError(f"task {task}: features are not finite; check backbone.weights, or try fp32")
        return self


def split_features(
    make: Callable[[Tensor], Tensor],
    data: TaskData,
    split: str,
    transforms: ImageTransforms,
    runtime: Runtime,
    batch_size: int = 64,
    until: float = math.inf,
) -> Features:
    """Compute features batch by batch, with evaluation transforms.

    Args:
        make: maps (B, 3, S, S) normalized images on the runtime's device to (B, ...) float32. It is called in inference
            mode, in the runtime's precision.
        until: stop before the next batch at this `time.monotonic` time. At least one batch is done.
    Raises:
        ValueError: no image can be read. FloatingPointError: a feature is NaN or infinite.
    """
    made, labels = [], []
    with torch.inference_mode(), runtime.autocast():
        for images, of_images in transforms.eval_batches(data, split, batch_size):
            made.append(make(transforms.normalize(images, device=runtime.device)).cpu())
            labels.append(of_images)
            if time.monotonic() >= until:
                break
    if not made:
        raise ValueError(f"task {data.name}: its {split} split has no image that can be read")
    return Features(torch.cat(made), torch.cat(labels)).checked(data.name)
