"""Weights of a task's classes in its loss, for tasks whose classes have unequal numbers of images."""

import numpy as np
import torch
from torch import Tensor


def balanced(labels: np.ndarray, classes: int) -> Tensor:
    """Images / (classes with images x images of the class), as scikit-learn's "balanced": (C,) float32.

    Every class counts alike in the sum over the training images, and the mean weight of these is 1. A class without
    an image has weight 0.

    Args:
        labels: int64 (N,), of the training images.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    weights = np.zeros(classes)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return torch.from_numpy(weights).float()
