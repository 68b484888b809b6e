"""Learn to recognize images that belong to none of a run's tasks (out-of-distribution), in `rejection.safetensors`.

For each task the file has the statistics of the training images that one of `evaluation.rejection.SCORES` needs, and a
threshold: the score that 95 % of the task's own validation images reach. The score is chosen by measurement on the
other tasks' validation images. The file is valid only for the weights it was made with.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from moe_bsr.config import ConfigError
from moe_bsr.data import TaskData
from moe_bsr.data.splits import class_by_class
from moe_bsr.evaluation import rejection
from moe_bsr.evaluation.features import split_features
from moe_bsr.evaluation.rejection import SCORES
from moe_bsr.model.backbones.pretrained import digest
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runs import archive, report
from moe_bsr.runs.contents import is_number
from moe_bsr.runtime import files
from moe_bsr.runtime.rng import key, stream

if TYPE_CHECKING:
    from moe_bsr.runs.load import TrainedRun

FILE = "rejection.safetensors"
MOST_IMAGES = 5000  # at most so many training images of a task are used, equally many of each class
# For a run of one task, in which nothing can be measured: the best on five real tasks (docs/log.md).
DEFAULT = "unit_mahalanobis"
AGAIN = "learn it again with moe_bsr.reject"


@dataclass(slots=True)
class Detector:
    """Decides whether an image belongs to a task.

    Attributes:
        score: key of `SCORES`.
        tensors: statistics of the training images that the score needs, by name.
        threshold: smallest score that is accepted.
        spread: standard deviation of the scores of the task's own validation images; the unit of `margins`.
    """

    score: str
    tensors: dict[str, Tensor]
    threshold: float
    spread: float

    def margins(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return the margins (N,) on the CPU. At least 0 means accepted. Margins of different tasks are comparable.

        Args:
            features: (N, D), inputs of the task's head. logits: (N, classes), its outputs.
        """
        scores = SCORES[self.score].of(self.tensors, features.float().cpu(), logits.float().cpu())
        return (scores - self.threshold) / self.spread


def learn(trained: TrainedRun, batch_size: int, on_task: Callable[[str, int], None]) -> dict[str, Any]:
    """Choose the score, fit a detector per task, and write them to the run's file and the results to its report.

    Args:
        on_task: called for each task with its name and its number of images, before these are processed.
    Returns:
        The measured results: score, accepted, mean_auroc by score, and tasks (see `_measured`).
    Raises:
        ConfigError: training or validation images are not those of the run, or the run is a zip file.
        ValueError: not all tasks are loaded.
    """
    archive.require_folder(trained.run, f"{FILE} is written into the folder of the run")
    tasks = list(trained.models)
    if tasks != trained.config.task_names():
        raise ValueError(f"{trained.run}: load all tasks of the run together: {trained.config.task_names()}")
    known: dict[str, dict[str, Tensor]] = {}
    seen: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}  # by task of the images, then by task of the model
    used = {}
    for task in tasks:
        trained.data(task, "train")
        data = _thinned(trained.data(task, "val"), MOST_IMAGES)
        on_task(task, len(data.train) + len(data.val))
        (own, labels) = _features_and_logits(trained, data, "train", [task], batch_size)
        known[task] = rejection.statistics(own[task][0], labels)
        seen[task], _ = _features_and_logits(trained, data, "val", tasks, batch_size)
        used[task] = len(labels), len(seen[task][task][0])
    compared = {name: _measured(name, known, seen) for name in SCORES} if len(tasks) > 1 else {}
    mean_auroc = {
        name: statistics.fmean(each["auroc"] for each in by_task.values()) for name, by_task in compared.items()
    }
    chosen = max(mean_auroc, key=lambda name: mean_auroc[name]) if compared else DEFAULT
    detectors = _detectors(chosen, known, seen)
    found = {
        "score": chosen,
        "accepted": rejection.ACCEPTED,
        "mean_auroc": mean_auroc,
        "tasks": {
            task: {"train_images": used[task][0], "val_images": used[task][1], **compared.get(chosen, {}).get(task, {})}
            for task in tasks
        },
    }
    _write(trained, detectors, found)
    return {"run": str(trained.run), "step": trained.step, **found}


def load(trained: TrainedRun) -> dict[str, Detector] | None:
    """Load the detectors of the run's loaded tasks. Return None if the run has not learned any.

    Raises:
        ConfigError: the file is damaged, or was made with other weights.
    """
    file = trained.run / FILE
    if files.kind(file) is None:
        return None
    try:
        files.require(file, "a file")
        with safe_open(file, "pt") as content:
            about = json.loads(content.metadata()["about"])
            tensors = {name: content.get_tensor(name) for name in content.keys()}
        found = {task: _checked(about[task], task, tensors, model) for task, model in trained.models.items()}
    except files.NotOrdinary as error:
        raise ConfigError(str(error)) from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file}: cut or damaged: {error}; {AGAIN}") from error
    if stale := [task for task, model in trained.models.items() if about[task]["weights"] != _identity(model)]:
        raise ConfigError(
            f"{file} was made with other weights of {stale[0]} than those of step {trained.step}; {AGAIN}"
        )
    return found


def _features_and_logits(
    trained: TrainedRun, data: TaskData, split: str, tasks: list[str], batch_size: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Compute features and logits of a split's images for each of these tasks, and return them with the labels."""
    groups = trained.grouped(tasks)
    ordered = [task for members in groups for task in members]

    def make(images: Tensor) -> Tensor:
        return torch.cat([part for _, *parts in trained.outputs(images, groups) for part in parts], 1)

    found = split_features(make, data, split, trained.transforms, trained.runtime, batch_size)
    heads = [trained.models[task].heads[task] for task in ordered]
    columns = found.x.split([width for head in heads for width in (head.in_features, head.out_features)], 1)
    return {task: (columns[2 * i], columns[2 * i + 1]) for i, task in enumerate(ordered)}, found.labels


def _thinned(data: TaskData, count: int) -> TaskData:
    """Restrict a task to `count` training images, equally many of each class as far as it has them."""
    order = stream(key(data.name, "rejection")).permutation(len(data.train))
    return data.select("train", np.sort(class_by_class(data.train.labels, np.argsort(order))[:count]))


def _detectors(
    score: str, known: dict[str, dict[str, Tensor]], seen: dict[str, dict[str, tuple[Tensor, Tensor]]]
) -> dict[str, Detector]:
    detectors = {}
    for task, tensors in known.items():
        needed = {name: tensors[name] for name in SCORES[score].needs}
        own = SCORES[score].of(needed, *seen[task][task])
        spread = float(own.double().std(correction=0))
        detectors[task] = Detector(score, needed, rejection.threshold(own), spread if spread > 0 else 1.0)
    return detectors


def _measured(
    score: str, known: dict[str, dict[str, Tensor]], seen: dict[str, dict[str, tuple[Tensor, Tensor]]]
) -> dict[str, dict[str, float]]:
    """Measure each task's detector on the validation images of all tasks. Shares are in [0, 1].

    Returns:
        By task. auroc: own images against another task's, mean over the other tasks. rejected: rejected share of
        another task's images, mean likewise. named: share of own images that this task accepts with the largest margin
        of all tasks. foreign: share of own images that all other tasks reject, as if the run did not have this task.
    """
    detectors, tasks = _detectors(score, known, seen), list(known)
    margins = {of: {by: detectors[by].margins(*seen[of][by]) for by in tasks} for of in tasks}
    found = {}
    for task in tasks:
        others = [margins[other][task] for other in tasks if other != task]
        own = margins[task][task]
        rivals = torch.stack([margins[task][other] for other in tasks if other != task]).amax(0)
        found[task] = {
            "auroc": statistics.fmean(rejection.auroc(own, each) for each in others),
            "rejected": statistics.fmean(float((each < 0).double().mean()) for each in others),
            "named": float(((own >= 0) & (own > rivals)).double().mean()),
            "foreign": float((rivals < 0).double().mean()),
        }
    return found


def _write(trained: TrainedRun, detectors: dict[str, Detector], found: dict[str, Any]) -> None:
    about = {
        task: {
            "score": each.score,
            "threshold": each.threshold,
            "spread": each.spread,
            "weights": _identity(trained.models[task]),
        }
        for task, each in detectors.items()
    }
    tensors = {f"{task}/{name}": t for task, each in detectors.items() for name, t in each.tensors.items()}
    tensors = tensors or {"none": torch.zeros(0)}
    content = to_bytes({name: t.contiguous() for name, t in tensors.items()}, {"about": json.dumps(about)})
    files.write_whole(trained.run / FILE, content)
    if (known := report.read(trained.run)) is not None:
        report.write(trained.run, known | {"rejection": found})


def _checked(about: dict[str, Any], task: str, tensors: dict[str, Tensor], model: MultitaskViT) -> Detector:
    """Return a task's detector from the file's content. Raise ValueError or KeyError if it does not fit the model."""
    score, width = about["score"], model.heads[task].in_features
    mine = {name: tensors[f"{task}/{name}"] for name in SCORES[score].needs}
    shapes = {"mean": (width,), "within": (width, width)}
    for name, tensor in mine.items():
        name = name.removeprefix("unit_")
        rows = len(tensor) if name == "class_means" and tensor.ndim == 2 else 0
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shapes.get(name, (max(rows, 1), width)):
            raise ValueError(f"{task}/{name} is {tensor.dtype} {tuple(tensor.shape)}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{task}/{name} has numbers that are not finite")
    if not is_number(about["threshold"]) or not is_number(about["spread"]) or about["spread"] <= 0:
        raise ValueError(f"threshold or spread of {task}")
    return Detector(score, mine, about["threshold"], about["spread"])


def _identity(model: MultitaskViT) -> str:
    """Return a hash of the weights that training changed."""
    return digest({name: p for name, p in model.named_parameters() if p.requires_grad})
