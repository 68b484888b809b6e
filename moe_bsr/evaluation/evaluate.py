"""Evaluation of one task: the only place where its numbers are made, for the trainer and for tools.

Each batch is reduced at once to a few numbers per image (`judge`) and a few counts per block
(`Activity`); no logits, tokens or routes are collected. Accuracies, chance and calibration are in
percent; shares lie between 0 and 1.
"""

import statistics
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moe_bsr.config.reader import nearest
from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.model.block import Record
from moe_bsr.runs.report import as_text
from moe_bsr.runtime.device import Runtime

ECE_BINS = 15
CONFUSIONS = 5
USED_SHARE = 0.01  # an expert with at least this share of the assignments counts as used
NORMAL_975 = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Predictions(NamedTuple):
    """What is left of the logits of N images; each an array (N,).

    Attributes:
        label, predicted: int64 classes; among equal logits the lower class is predicted.
        rank: int64 number of classes ahead of the label: image is right in the top k if rank < k.
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
        """Room for `size` images, taken at once.

        A small array kept from each batch would pin the heap between two batches' large tensors, which
        glibc then cannot reuse: an evaluation of 18,000 images grew to 14 GB.
        """
        return cls(*(np.zeros(size, np.int64) for _ in range(3)), *(np.zeros(size) for _ in range(2)))

    def fill(self, start: int, part: "Predictions") -> None:
        for mine, theirs in zip(self, part, strict=True):
            mine[start : start + len(theirs)] = theirs


def evaluate(
    model: nn.Module, data: TaskData, split: str, transforms: ImageTransforms, runtime: Runtime, batch_size: int = 64
) -> dict:
    """All numbers of one task on a split ("train", "val" or "test"), as plain JSON types.

    The numbers of `summarize` and `Activity.summary`, and `images_per_second` of the network
    (normalization and forward pass, median over batches; reading images is left out). All but that
    one depend on the arguments alone, on `batch_size` only by rounding.

    Args:
        machine: its `device` and `autocast()` are used, as in training.
    Raises:
        ValueError: no images, or not as many classes as the head has.
        FloatingPointError: a logit is NaN or infinite.
    """
    size, done = len(getattr(data, split)), 0
    if size == 0:
        raise ValueError(f"task {data.name}: its {split} split has no images to evaluate")
    judged, activity, rates = Predictions.empty(size), TokenAndExpertUsage(), []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), runtime.autocast():
            for images, labels in transforms.eval_batches(data, split, batch_size):
                start = time.perf_counter()
                output = model(transforms.normalize(images, device=runtime.device), data.name)
                logits = output.logits.float().cpu()
                rates.append(len(images) / (time.perf_counter() - start))
                _check(logits, data)
                judged.fill(done, judge(logits, labels))
                done += len(labels)
                activity.add(output.records)
    finally:
        model.train(was_training)
    return summarize(judged, data.class_names) | activity.summary() | {"images_per_second": statistics.median(rates)}


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


def judge(logits: Tensor, labels: Tensor) -> Predictions:
    """Reduce finite logits (N, C) and labels (N,) int64, both on the CPU, to numbers per image."""
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


def summarize(judged: Predictions, class_names: list[str]) -> dict:
    """Accuracy, calibration, loss and confusions of N >= 1 images.

    top1, top5 (or all classes, where there are fewer), `top1_low` and `top1_high` (95 % interval),
    `mean_class_accuracy` over the classes that the split has, `ece`, `chance` (share of the largest
    class: what naming it always would score), `loss`, `n`, `confusions` (see `largest_confusions`).
    """
    n, right = len(judged.label), judged.rank == 0
    of_class = np.bincount(judged.label, minlength=len(class_names))
    right_of_class = np.bincount(judged.label[right], minlength=len(class_names))
    present = of_class > 0
    low, high = wilson_interval(int(right.sum()), n)
    return {
        "top1": float(100 * right.sum() / n),
        "top1_low": 100 * low,
        "top1_high": 100 * high,
        "top5": float(100 * (judged.rank < 5).sum() / n),
        "mean_class_accuracy": 100 * float((right_of_class[present] / of_class[present]).mean()),
        "ece": 100 * calibration_error(judged.confidence, right),
        "chance": float(100 * of_class.max() / n),
        "loss": float(judged.loss.mean()),
        "n": n,
        "confusions": largest_confusions(judged.label, judged.predicted, class_names),
    }


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a share: (low, high), 95 %."""
    share, z = hits / n, NORMAL_975
    spread = z * z / n
    half = z * (share * (1 - share) / n + spread / (4 * n)) ** 0.5
    middle = share + spread / 2
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return 0.0 if hits == 0 else low, 1.0 if hits == n else high


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017): mean |accuracy - confidence|, 15 equal bins.

    Args:
        confidence: (N,) in (0, 1]; a bin holds its upper edge. right: (N,) bool.
    """
    place = np.digitize(confidence, np.arange(1, ECE_BINS) / ECE_BINS, right=True)
    return float(np.abs(np.bincount(place, weights=right - confidence)).sum() / len(right))


def largest_confusions(
    label: np.ndarray, predicted: np.ndarray, class_names: list[str], limit: int = CONFUSIONS
) -> list[dict]:
    """The most frequent wrong answers, as {true, predicted, count, share}.

    `share` is that of the true class's images. Ties go to the lower true, then predicted class.
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


class TokenAndExpertUsage:
    """What the blocks did in an evaluation: patches kept, assignments per expert."""

    def __init__(self) -> None:
        self._entering: dict[int, int] = {}
        self._kept: dict[int, Tensor] = {}
        self._load: dict[int, Tensor] = {}

    def add(self, records: dict[int, Record]) -> None:
        """Count one forward pass in evaluation mode: without gate noise, a load is a count."""
        for block, record in records.items():
            if (dropped := record.dropped) is not None:
                self._entering[block] = self._entering.get(block, 0) + dropped.origin_in.numel()
                self._add(self._kept, block, (dropped.origin >= 0).sum())
            if (routing := record.routing) is not None:
                self._add(self._load, block, routing.load.round().long())

    @staticmethod
    def _add(sums: dict[int, Tensor], block: int, amount: Tensor) -> None:
        """In place, and so in one place of memory for the whole evaluation (see `Judged.empty`)."""
        if block in sums:
            sums[block] += amount
        else:
            sums[block] = amount

    def summary(self) -> dict:
        """Block indices are strings, as in JSON.

        tokens_kept: mean share of the image's patches that reach the end, fused ones not counted.
        tokens_kept_after: the same after each drop block. expert_share: share of the assignments
        that each expert got, by MoE block. experts_used: how many experts got at least 1 % (with
        more than 50 experts: half of an equal share).
        """
        kept = {
            str(block): int(count) / self._entering[min(self._entering)] for block, count in sorted(self._kept.items())
        }
        shares = {str(block): load.cpu().double() / int(load.sum()) for block, load in sorted(self._load.items())}
        return {
            "tokens_kept": list(kept.values())[-1] if kept else 1.0,
            "tokens_kept_after": kept,
            "experts_used": {
                block: int((share >= min(USED_SHARE, 0.5 / len(share))).sum()) for block, share in shares.items()
            },
            "expert_share": {block: share.tolist() for block, share in shares.items()},
        }


def chosen_tasks(asked: list[str] | None, known: list[str]) -> list[str]:
    """The tasks asked for, each once, or all of them.

    Raises:
        ValueError: naming an unknown one, those there are and the nearest.
    """
    for task in asked or []:
        if task not in known:
            raise ValueError(f"--task {task}: this run has {', '.join(known)}{nearest(task, known, str)}")
    return list(dict.fromkeys(asked or known))


COLUMNS = (
    "task",
    "top-1 %",
    "95 % interval",
    "top-5 %",
    "per class %",
    "ECE %",
    "chance %",
    "images",
    "images/s",
    "tokens kept",
    "experts used",
)


def table(results: dict[str, dict]) -> str:
    """Results of `evaluate` by task, as aligned text: a row each, their mean, the confusions."""
    rows = [COLUMNS, *(_row(task, result) for task, result in results.items())]
    if len(results) > 1:
        rows.append(_mean_row(list(results.values())))
    lines = [as_text(rows), "", "Largest confusions (share of the class that was mistaken):"]
    for task, result in results.items():
        pairs = [
            f"{c['true']} -> {c['predicted']} {c['count']}x ({100 * c['share']:.0f} %)" for c in result["confusions"]
        ]
        lines.append(f"  {task}: {', '.join(pairs) or 'none'}")
    return "\n".join(lines)


def _row(task: str, result: dict) -> tuple[str, ...]:
    experts = [len(share) for share in result["expert_share"].values()]
    used = " ".join(map(str, result["experts_used"].values()))
    return (
        task,
        f"{result['top1']:.1f}",
        f"{result['top1_low']:.1f} - {result['top1_high']:.1f}",
        *_percentages(result),
        str(result["n"]),
        f"{result['images_per_second']:.0f}",
        f"{100 * result['tokens_kept']:.1f} %",
        f"{used} of {max(experts)}" if experts else "-",
    )


def _mean_row(results: list[dict]) -> tuple[str, ...]:
    keys = ("top1", "top5", "mean_class_accuracy", "ece", "chance")
    mean = {key: statistics.fmean(result[key] for result in results) for key in keys}
    return ("mean", f"{mean['top1']:.1f}", "", *_percentages(mean), "", "", "", "")


def _percentages(result: dict) -> list[str]:
    return [f"{result[key]:.1f}" for key in ("top5", "mean_class_accuracy", "ece", "chance")]
