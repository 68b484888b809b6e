"""Evaluation of one task. The trainer and the command line both use this code.

Each batch is reduced at once to a few numbers per image (`metrics.score_batch`) and a few counts per block
(`usage.TokenAndExpertUsage`). Logits, tokens and routing are not collected. Accuracies, chance and calibration error
are in percent; shares are in [0, 1].

Several processes share the batches. Each batch is the same as with one process, so the numbers have the same bits.
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
    """Return all numbers of one task on a split ("train", "val" or "test"), as JSON types.

    These are the numbers of `summarize` and `TokenAndExpertUsage.summary`, and `images_per_second` of the network
    (normalization and forward pass without loading images; median over batches). All except that speed depend only on
    the arguments, and on `batch_size` only by rounding.

    Args:
        runtime: its `device` and `autocast()` are used, as in training.
        ranks: processes that all call this function and share the images. All of them get the numbers.
    Raises:
        ValueError: there are no images, or the head has another number of classes.
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
    """Context with the model in evaluation mode. Use it around several evaluations to switch the mode only once."""
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
    """Return the predictions for a split, in its order. Arguments and errors are those of `evaluate`.

    Args:
        watch: called for each batch with the output, the number of images and the seconds (without loading).
    """
    return _whole(data, split, [_predict(model, data, split, transforms, runtime, batch_size, watch, Alone())])


def _whole(data: TaskData, split: str, parts: list[Predictions]) -> Predictions:
    """Concatenate the parts in order; raises ValueError if there are no predictions."""
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
    """Return the predictions for this process's batches, without images that could not be read."""
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
    if not logits.isfinite().all():  # comparisons with NaN are false, so its rank would be 0: 100 % accuracy
        raise FloatingPointError(
            f"task {data.name}: logits are not finite; the weights are broken, use an earlier checkpoint"
        )
