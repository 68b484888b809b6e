"""Evaluation of one task: the only place where its numbers are made, for the trainer and for the command line.

Each batch is reduced at once to a few numbers per image (`metrics.score_batch`) and a few counts per block
(`usage.TokenAndExpertUsage`); no logits, tokens or routes are collected. Accuracies, chance and calibration
are in percent; shares lie between 0 and 1.

Several processes share the batches, each of which is what it would be in one: the numbers have the same bits.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.evaluation.metrics import Predictions, score_batch, summarize
from moe_bsr.evaluation.usage import TokenAndExpertUsage
from moe_bsr.runtime.device import Runtime
from moe_bsr.runtime.distributed import Alone

BATCH = 64  # images


def evaluate(
    model: nn.Module,
    data: TaskData,
    split: str,
    transforms: ImageTransforms,
    runtime: Runtime,
    batch_size: int = BATCH,
    ranks: Alone | None = None,
) -> dict:
    """All numbers of one task on a split ("train", "val" or "test"), as plain JSON types.

    The numbers of `summarize` and `TokenAndExpertUsage.summary`, and `images_per_second` of the network
    (normalization and forward pass, median over batches; reading images is left out). All but that
    one depend on the arguments alone, on `batch_size` only by rounding.

    Args:
        runtime: its `device` and `autocast()` are used, as in training.
        ranks: processes that all call this and share the images; all get the numbers.
    Raises:
        ValueError: no images, or not as many classes as the head has.
        FloatingPointError: a logit is NaN or infinite.
        Interrupted: a signal reached one of the `ranks`.
    """
    ranks = ranks or Alone()
    usage, rates = TokenAndExpertUsage(data.name), []

    def watch(output: Any, images: int, seconds: float) -> None:
        usage.add(output.records)
        rates.append(images / seconds)

    predictions = _predict(model, data, split, transforms, runtime, batch_size, watch, ranks)
    usage.to_cpu()
    parts = ranks.gather((predictions, usage, rates))
    usage = TokenAndExpertUsage(data.name)
    for _, counted, _ in parts:
        usage.merge(counted)
    predictions = _whole(data, split, [part for part, _, _ in parts])
    speed = statistics.median(itertools.chain.from_iterable(rates for _, _, rates in parts))
    return summarize(predictions, data.class_names) | usage.summary() | {"images_per_second": speed}


@contextlib.contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was. Who evaluates many tasks switches it once for all."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def predict(
    model: nn.Module,
    data: TaskData,
    split: str,
    transforms: ImageTransforms,
    runtime: Runtime,
    batch_size: int = BATCH,
    watch: Callable[[Any, int, float], None] = lambda output, images, seconds: None,
) -> Predictions:
    """What the model makes of each image of a split, in the split's order; otherwise as `evaluate`.

    Args:
        watch: told the output, the number of images and the seconds (see `evaluate`) of each batch.
    """
    return _whole(data, split, [_predict(model, data, split, transforms, runtime, batch_size, watch, Alone())])


def _whole(data: TaskData, split: str, parts: list[Predictions]) -> Predictions:
    """All parts together, in their order."""
    predictions = Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    if len(predictions.label) == 0:
        size = len(getattr(data, split))
        raise ValueError(f"task {data.name}: not one of its {size} {split} images can be read")
    return predictions


def _predict(
    model: nn.Module,
    data: TaskData,
    split: str,
    transforms: ImageTransforms,
    runtime: Runtime,
    batch_size: int,
    watch: Callable[[Any, int, float], None],
    ranks: Alone,
) -> Predictions:
    """Of the batches that are this process's, without those images that were skipped."""
    size, done = len(getattr(data, split)), 0
    if size == 0:
        raise ValueError(f"task {data.name}: its {split} split has no images to evaluate")
    batches = ranks.mine(-(-size // batch_size))
    predictions = Predictions.empty(batch_size * len(batches))
    with scoring(model), torch.inference_mode(), runtime.autocast():
        for images, labels in transforms.eval_batches(data, split, batch_size, batches):
            if ranks.leaving:
                break
            start = time.perf_counter()
            output = model(transforms.normalize(images, device=runtime.device), data.name)
            logits = output.logits.float().cpu()
            seconds = time.perf_counter() - start
            _check(logits, data)
            predictions.fill(done, score_batch(logits, labels))
            done += len(labels)
            watch(output, len(images), seconds)
    return Predictions(*(part[:done] for part in predictions))


def _check(logits: Tensor, data: TaskData) -> None:
    if logits.shape[1] != len(data.class_names):
        raise ValueError(
            f"task {data.name}: its data have {len(data.class_names)} classes, the "
            f"model's head {logits.shape[1]}; it was trained on other data"
        )
    if not logits.isfinite().all():  # nothing compares above NaN: it would score 100 %
        raise FloatingPointError(
            f"task {data.name}: logits that are not finite; the weights are broken, go back to an earlier checkpoint"
        )
