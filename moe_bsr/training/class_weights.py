"""Class weights in the loss, for tasks whose classes have unequal numbers of images."""

import numpy as np
import torch
from torch import Tensor


def balanced(labels: np.ndarray, classes: int) -> Tensor:
    """Return scikit-learn's "balanced" weights: images / (classes with images x images of the class), (C,) float32.

    Every class has the same total weight over the training images, and the mean weight of an image is 1. A class
    without images has weight 0.

    Args:
        labels: int64 (N,), of the training images.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    weights = np.zeros(classes)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return torch.from_numpy(weights).float()
