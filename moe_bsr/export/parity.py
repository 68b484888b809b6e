"""Compare an exported graph with the run in float32, on the run's own images.

Only a float32 graph can be compared by a tolerance. If weights are rounded, a few other tokens are dropped or go to
another expert, and logits jump. For such graphs equal predictions are counted.
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
    """The graph does not compute the same as the run. Nothing was written."""


@torch.inference_mode()
def reference(model: MultitaskViT, inputs: Tensor, task: str) -> np.ndarray:
    """Return the model's own logits (B, classes), float32."""
    tokens, _ = model.forward_features(inputs, task, upto=len(model.plan))
    return model.logits(tokens, task).numpy()


def batches(run: TrainedRun, task: str, split: str, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalized images (B, 3, S, S) and labels (B,) of a split: all, or `most` spread evenly over it."""
    data = run.data(task, split)
    for images, labels in run.transforms.eval_batches(data.thinned(split, most), split, BATCH):
        yield run.transforms.normalize(images), labels


@dataclasses.dataclass(slots=True)
class Answers:
    """Logits (N, classes) of N images, and their labels (N,)."""

    logits: np.ndarray
    labels: np.ndarray


def of_model(run: TrainedRun, model: MultitaskViT, task: str, most: int) -> Answers:
    """Return the model's logits for validation images, and the labels.

    Raises:
        ValueError: no validation image can be read.
    """
    found = [(reference(model, inputs, task), labels.numpy()) for inputs, labels in batches(run, task, "val", most)]
    if not found:
        raise ValueError(f"task {task}: no validation image can be read, so the export cannot be checked")
    return Answers(*(np.concatenate(part) for part in zip(*found, strict=True)))


def of_bundle(run: TrainedRun, bundle: Bundle, task: str, most: int) -> np.ndarray:
    """Return a bundle's logits for the same images. Nothing is computed for other tasks."""
    found = (bundle.logits(inputs.numpy(), [task])[task] for inputs, _ in batches(run, task, "val", most))
    return np.concatenate(list(found))


def accuracy(logits: np.ndarray, labels: np.ndarray, class_names: list[str]) -> dict[str, Any]:
    """Return n, top1, and the ends of its 95 % interval top1_low and top1_high, in percent."""
    predictions: Predictions = score_batch(torch.from_numpy(logits), torch.from_numpy(labels))
    found = summarize(predictions, class_names)
    return {key: found[key] for key in ("n", "top1", "top1_low", "top1_high")}


def prove(expected: np.ndarray, found: np.ndarray, graph: str) -> dict[str, Any]:
    """Return the result of `on_device.compare`, and check it.

    Raises:
        NotEqual: logits differ by more than the tolerance, or an image gets another first class although the expected
            one leads by more than the tolerance.
    """
    result = compare(expected, found)
    if not result["difference"] <= result["tolerance"] or result["decided_otherwise"]:
        raise NotEqual(
            f"{graph}: its logits differ from the run's by up to {result['difference']:.1e} where "
            f"{result['tolerance']:.1e} is allowed, and {result['decided_otherwise']} of {result['images']} images get "
            "another first class; nothing was written"
        )
    return result
