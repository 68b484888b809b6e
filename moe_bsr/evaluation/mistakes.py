"""What a model takes for what, and the images it is most wrong about."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from torch import nn

from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.data.task import Split
from moe_bsr.evaluation.evaluate import predict
from moe_bsr.runtime.device import Runtime


@dataclass(slots=True)
class Mistake:
    """One image that was named wrongly.

    Attributes:
        image: (3, S, S) uint8, as the model saw it. true, predicted: class names.
        confidence: probability of the class predicted. loss: cross-entropy in nats.
    """

    image: np.ndarray
    true: str
    predicted: str
    confidence: float
    loss: float


@dataclass(slots=True)
class Mistakes:
    """A task's answers on its validation images, and the worst of them.

    Attributes:
        class_names: C of them. counts: (C, C) int64 images by true class (row) and answer (column).
        worst: the wrong answers of the largest loss, worst first.
    """

    class_names: list[str]
    counts: np.ndarray
    worst: list[Mistake]


def find_mistakes(
    model: nn.Module, data: TaskData, transforms: ImageTransforms, runtime: Runtime, worst: int, batch_size: int = 64
) -> Mistakes:
    """All validation images of `data` once through the model; at most `worst` of the wrong ones are kept."""
    found, names = predict(model, data, "val", transforms, runtime, batch_size), data.class_names
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (found.label, found.predicted), 1)
    wrong = np.flatnonzero(found.label != found.predicted)
    chosen = wrong[np.argsort(-found.loss[wrong], kind="stable")][:worst]
    if not len(chosen):
        return Mistakes(names, counts, [])
    places = transforms.readable(data, "val")[chosen]
    split = Split(data.val.source, data.val.index[places], data.val.labels[places])
    images, _ = next(transforms.eval_batches(dataclasses.replace(data, val=split), "val", len(chosen)))
    return Mistakes(
        names,
        counts,
        [
            Mistake(image, names[found.label[i]], names[found.predicted[i]], found.confidence[i], found.loss[i])
            for image, i in zip(images.numpy(), chosen, strict=True)
        ],
    )
