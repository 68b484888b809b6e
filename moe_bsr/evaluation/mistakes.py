"""Find a model's mistakes: its confusion matrix, and the wrong answers with the largest loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.evaluation.evaluate import predict
from moe_bsr.runtime.device import Runtime


@dataclass(slots=True)
class Mistake:
    """One misclassified image.

    Attributes:
        image: (3, S, S) uint8, as given to the model. true, predicted: class names.
        confidence: probability of the predicted class. loss: cross-entropy in nats.
    """

    image: np.ndarray
    true: str
    predicted: str
    confidence: float
    loss: float


@dataclass(slots=True)
class Mistakes:
    """Answers for a task's validation images.

    Attributes:
        class_names: names of the C classes. counts: (C, C) int64 images by true class (row) and answer (column).
        worst: wrong answers with the largest loss, largest first.
    """

    class_names: list[str]
    counts: np.ndarray
    worst: list[Mistake]


def find_mistakes(
    model: nn.Module, data: TaskData, transforms: ImageTransforms, runtime: Runtime, worst: int, batch_size: int = 64
) -> Mistakes:
    """Classify all validation images of `data`, and return at most `worst` wrong answers with their images."""
    found, names = predict(model, data, "val", transforms, runtime, batch_size), data.class_names
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (found.label, found.predicted), 1)
    wrong = np.flatnonzero(found.label != found.predicted)
    chosen = wrong[np.argsort(-found.loss[wrong], kind="stable")][:worst]
    if not len(chosen):
        return Mistakes(names, counts, [])
    places = transforms.readable(data, "val")[chosen]
    images, _ = next(transforms.eval_batches(data.select("val", places), "val", len(chosen)))
    return Mistakes(
        names,
        counts,
        [
            Mistake(image, names[found.label[i]], names[found.predicted[i]], found.confidence[i], found.loss[i])
            for image, i in zip(images.numpy(), chosen, strict=True)
        ],
    )
