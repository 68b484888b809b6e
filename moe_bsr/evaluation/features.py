"""What a network makes of all images of a split, in one pass: features for whoever fits something to them."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.runtime.device import Runtime


class Features(NamedTuple):
    """Of the N images of a split that can be read, in its order; both on the CPU.

    Attributes:
        x: (N, ...) float32. labels: (N,) int64.
    """

    x: Tensor
    labels: Tensor

    def checked(self, task: str) -> "Features":
        """These.

        Raises:
            FloatingPointError: one is NaN or infinite.
        """
        if not self.x.isfinite().all():
            raise FloatingPointError(f"task {task}: features that are not finite; check backbone.weights, or fp32")
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
    """The images as evaluation sees them, batch by batch.

    Args:
        make: (B, 3, S, S) normalized images on the runtime's device -> (B, ...) float32; runs without a graph, in the
            runtime's precision.
        until: no further batch is made at this time of `time.monotonic`; one always is.
    Raises:
        ValueError: no image, or none that can be read. FloatingPointError: a feature is NaN or infinite.
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
