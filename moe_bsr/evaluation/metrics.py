"""Accuracy, calibration and confusions from predictions. Values are in percent, except shares, which are in [0, 1].

`score_batch` reduces the logits of a batch to a few numbers per image, so memory allows any number of images.
"""

import math
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ECE_BINS = 15
CONFUSIONS = 5
NORMAL_975 = 1.959963984540054  # 97.5 % quantile of the normal distribution
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom. The last one, used for more, is slightly too wide.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class Predictions(NamedTuple):
    """Numbers computed from the logits of N images, as arrays (N,).

    Attributes:
        label, predicted: int64 classes. Among equal logits, the lower class is predicted.
        rank: int64 number of classes ranked above the label. The top-k answer is right if rank < k.
        confidence: float64 probability of the predicted class.
        loss: float64 cross-entropy in nats.
    """

    label: np.ndarray
    predicted: np.ndarray
    rank: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray

    @classmethod
    def empty(cls, size: int) -> "Predictions":
        """Allocate the arrays for `size` images at once.

        If a small array of each batch were kept instead, it would lie on the heap between the large tensors of two
        batches, and glibc could not reuse that memory: an evaluation of 18,000 images grew to 14 GB.
        """
        return cls(*(np.zeros(size, np.int64) for _ in range(3)), *(np.zeros(size) for _ in range(2)))

    def fill(self, start: int, part: "Predictions") -> None:
        for mine, theirs in zip(self, part, strict=True):
            mine[start : start + len(theirs)] = theirs


def score_batch(logits: Tensor, labels: Tensor) -> Predictions:
    """Reduce finite logits (N, C) and labels (N,) int64, both on the CPU, to a few numbers per image."""
    log_probabilities = logits.double().log_softmax(1)
    label = labels.unsqueeze(1)
    own = logits.gather(1, label)
    ahead = (logits > own) | ((logits == own) & (torch.arange(logits.shape[1]) < label))
    return Predictions(
        labels.numpy(),
        logits.argmax(1).numpy(),
        ahead.sum(1).numpy(),
        log_probabilities.amax(1).exp().numpy(),
        -log_probabilities.gather(1, label).squeeze(1).numpy(),
    )


def summarize(predictions: Predictions, class_names: list[str]) -> dict:
    """Return accuracy, calibration, loss and confusions of N >= 1 images.

    Returns:
        `top1`; `top5` (100 with fewer than six classes); `top1_low` and `top1_high` (95 % interval);
        `mean_class_accuracy` over the classes in the split; `ece`; `chance` (share of the largest class, the score of
        always predicting it); `loss`; `n`; `confusions` (see `largest_confusions`).
    """
    n, right = len(predictions.label), predictions.rank == 0
    of_class = np.bincount(predictions.label, minlength=len(class_names))
    right_of_class = np.bincount(predictions.label[right], minlength=len(class_names))
    present = of_class > 0
    low, high = wilson_interval(int(right.sum()), n)
    return {
        "top1": float(100 * right.sum() / n),
        "top1_low": 100 * low,
        "top1_high": 100 * high,
        "top5": float(100 * (predictions.rank < 5).sum() / n),
        "mean_class_accuracy": 100 * float((right_of_class[present] / of_class[present]).mean()),
        "ece": 100 * calibration_error(predictions.confidence, right),
        "chance": float(100 * of_class.max() / n),
        "loss": float(predictions.loss.mean()),
        "n": n,
        "confusions": largest_confusions(predictions.label, predictions.predicted, class_names),
    }


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval (low, high) of the share hits / n."""
    share, z = hits / n, NORMAL_975
    spread = z * z / n
    half = z * (share * (1 - share) / n + spread / (4 * n)) ** 0.5
    middle = share + spread / 2
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return 0.0 if hits == 0 else low, 1.0 if hits == n else high


def half_width(top1: dict[str, float], images: dict[str, int]) -> float:
    """Return half the width of the 95 % interval of the mean accuracy over tasks, all in percent.

    Args:
        top1: accuracy by task. images: number of images by task.
    """
    variance = sum(share * (100 - share) / images[task] for task, share in top1.items())
    return NORMAL_975 * variance**0.5 / len(top1)


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Return the mean of one value per seed with its 95 % interval (Student's t).

    Returns:
        {"mean", "low", "high", "each"}; low and high are None for a single seed.
    """
    mean, count = fmean(values), len(values)
    if count == 1:
        return {"mean": mean, "low": None, "high": None, "each": values}
    half = T_975[min(count - 1, len(T_975)) - 1] * stdev(values) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "each": values}


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error (Guo et al. 2017): mean |accuracy - confidence| over 15 equal bins.

    Args:
        confidence: (N,) in (0, 1]; a bin includes its upper edge. right: (N,) bool.
    """
    place = np.digitize(confidence, np.arange(1, ECE_BINS) / ECE_BINS, right=True)
    return float(np.abs(np.bincount(place, weights=right - confidence)).sum() / len(right))


def largest_confusions(
    label: np.ndarray, predicted: np.ndarray, class_names: list[str], limit: int = CONFUSIONS
) -> list[dict]:
    """Return the most frequent wrong answers, as {true, predicted, count, share}.

    `share` is relative to the images of the true class. Ties go to the lower true class, then to the lower predicted
    class.
    """
    of_class = np.bincount(label, minlength=len(class_names))
    wrong = label != predicted
    answers = np.stack([label[wrong], predicted[wrong]])
    pairs, counts = np.unique(answers, axis=1, return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:limit]
    return [
        {
            "true": class_names[true],
            "predicted": class_names[other],
            "count": int(count),
            "share": float(count / of_class[true]),
        }
        for (true, other), count in zip(pairs.T[largest], counts[largest], strict=True)
    ]
