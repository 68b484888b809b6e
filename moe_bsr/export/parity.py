"""What an exported graph computes, beside what the run computes in float32, on the run's own images.

Only float32 can be held to a tolerance: wherever something is rounded a token more or less is dropped, or goes to
another expert, and logits jump. There, equal predictions are counted.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_bsr.evaluation.metrics import Predictions, score_batch, summarize
from moe_bsr.export.on_device import Bundle, compare
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runs.load import TrainedRun

BATCH = 32


class NotEqual(ValueError):
    """The graph does not compute what the run does; nothing was written."""


@torch.inference_mode()
def reference(model: MultitaskViT, inputs: Tensor, task: str) -> np.ndarray:
    """Logits (B, classes) of the model itself, float32."""
    tokens, _ = model.forward_features(inputs, task, upto=len(model.plan))
    return model.logits(tokens, task).numpy()


def batches(run: TrainedRun, task: str, split: str, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized images (B, 3, S, S) and labels (B,) of a split: all, or `most` spread evenly over it."""
    data = run.data(task, split)
    for images, labels in run.transforms.eval_batches(data.thinned(split, most), split, BATCH):
        yield run.transforms.normalize(images), labels


@dataclasses.dataclass(slots=True)
class Answers:
    """Logits of N images, and their labels."""

    logits: np.ndarray
    labels: np.ndarray


def of_model(run: TrainedRun, model: MultitaskViT, task: str, most: int) -> Answers:
    """The model's answers to validation images."""
    found = [(reference(model, inputs, task), labels.numpy()) for inputs, labels in batches(run, task, "val", most)]
    if not found:
        raise ValueError(f"task {task}: no validation image can be read, so nothing proves the export")
    return Answers(*(np.concatenate(part) for part in zip(*found, strict=True)))


def of_bundle(run: TrainedRun, bundle: Bundle, task: str, most: int) -> np.ndarray:
    """A bundle's logits for the same images; nothing is computed for other tasks."""
    found = (bundle.logits(inputs.numpy(), [task])[task] for inputs, _ in batches(run, task, "val", most))
    return np.concatenate(list(found))


def accuracy(logits: np.ndarray, labels: np.ndarray, class_names: list[str]) -> dict[str, Any]:
    """n, top1, top1_low and top1_high: percent, with the 95 % interval."""
    predictions: Predictions = score_batch(torch.from_numpy(logits), torch.from_numpy(labels))
    found = summarize(predictions, class_names)
    return {key: found[key] for key in ("n", "top1", "top1_low", "top1_high")}


def prove(expected: np.ndarray, found: np.ndarray, graph: str) -> dict[str, Any]:
    """The comparison of `on_device.compare`.

    Raises:
        NotEqual: a difference above the tolerance, or another first class where the first one leads by more.
    """
    told = compare(expected, found)
    if not told["difference"] <= told["tolerance"] or told["decided_otherwise"]:
        raise NotEqual(
            f"{graph}: its logits differ from the run's by up to {told['difference']:.1e} where "
            f"{told['tolerance']:.1e} is allowed, and {told['decided_otherwise']} of {told['images']} images get "
            "another first class; nothing was written"
        )
    return told
