"""Training with `train.optimizer: lbfgs`: the only update of the run solves a linear probe for each task.

Everything else is inherited from the trainer: run folder, evaluation, the single test, report. So a probe is a run like
any other. With `train.minutes` it uses as many training images as it can compute features for in that time, taken
equally from all classes.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from moe_bsr.data import TaskData
from moe_bsr.data.loader import Batch
from moe_bsr.data.splits import class_by_class
from moe_bsr.evaluation.features import Features, split_features
from moe_bsr.runtime.rng import key, stream
from moe_bsr.training.callback import Callback, StepEvent
from moe_bsr.training.feature_cache import CachedInputs
from moe_bsr.training.linear_probe import Probe, fit
from moe_bsr.training.trainer import Trainer


class ProbeTrainer(Trainer):
    """Trainer whose only update solves all heads.

    Attributes:
        used: number of training images used, by task. validating: seconds spent on features of validation images.
    """

    def __init__(self, *arguments: Any, callbacks: Iterable[Callback] = (), **keywords: Any) -> None:
        self.penalties, self.used, self.validating = Penalties(), {}, 0.0
        super().__init__(*arguments, callbacks=[*callbacks, self.penalties], **keywords)

    def _update(self, batches: Iterator[Batch]) -> None:
        settings, began = self.config.train, time.monotonic()
        self.model.eval()
        with self.stop.at_once():  # a signal may interrupt: no head has changed yet
            probes = self._solve_all()
        with torch.no_grad():
            for task, probe in probes.items():
                self.model.heads[task].weight.copy_(probe.weight)
                self.model.heads[task].bias.copy_(probe.bias)
        self.state.step += 1
        self.penalties.results = {
            task: {
                "chosen": probe.chosen.penalty,
                "images": self.used[task],
                "path": [asdict(each) for each in probe.path],
            }
            for task, probe in probes.items()
        }
        progress = self._progress()
        speed = sum(counts["images"] for counts in progress.values()) / (time.monotonic() - began)
        for task, probe in probes.items():
            metrics = {
                "loss": probe.chosen.train_loss,
                "auxiliary_loss": 0.0,
                "accuracy": probe.chosen.train_top1 / 100,
                "lr": settings.lr,
                "penalty": probe.chosen.penalty,
            }
            self.callbacks.tell("on_step", StepEvent(self.state.step, task, metrics, progress, [], speed))

    def _decide_length(self) -> list[str]:
        """Plan a single update, whatever `train.minutes` is."""
        self.state.plan(1, self.config.train.minutes)
        self._plan(1)
        return []

    def _solve_all(self) -> dict[str, Probe]:
        """Solve every task's probe. Each task gets an equal share of the minutes, plus what smaller tasks left over.

        The time for validation images comes on top. In a short run it would otherwise leave none for training images.
        """
        minutes, began = self.config.train.minutes, time.monotonic()
        order = sorted(self.tasks, key=lambda task: len(self.tasks[task].train))
        probes = {}
        for place, task in enumerate(order):
            until = math.inf if minutes is None else began + self.validating + 60 * minutes * (place + 1) / len(order)
            probes[task] = self._solve(self.tasks[task], until)
        return {task: probes[task] for task in self.tasks}

    def _solve(self, data: TaskData, until: float = math.inf) -> Probe:
        settings, split = self.config.train, data.train
        read = partial(self._read, data.name)
        order = np.arange(len(split))
        if until < math.inf:
            ranks = np.argsort(stream(key(self.config.seed, data.name, "probe")).permutation(len(split)))
            order = class_by_class(split.labels, ranks)
        if isinstance(self.inputs, CachedInputs):
            train = self._kept_features(self.inputs, data.name, order, until)
        else:
            data = data.select("train", order)
            train = split_features(read, data, "train", self.transforms, self.runtime, settings.batch_size, until)
        began = time.monotonic()
        val = split_features(read, data, "val", self.transforms, self.runtime, settings.batch_size)
        self.validating += time.monotonic() - began
        self.used[data.name] = len(train.labels)
        return fit(train, val, len(data.class_names), settings.penalty, settings.label_smoothing)

    def _read(self, task: str, images: torch.Tensor) -> torch.Tensor:
        tokens, _ = self.model.forward_features(images, task, upto=len(self.model.plan))
        return self.model.features(tokens)

    def _kept_features(self, inputs: CachedInputs, task: str, order: np.ndarray, until: float) -> Features:
        """Return the features of training images through the feature cache, which stores them."""
        size, made, labels = self.config.train.batch_size, [], []
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        plan = ((task, part, np.zeros_like(part)) for part in parts)
        with contextlib.closing(inputs.batches(plan)) as batches, torch.inference_mode(), self.runtime.autocast():
            for part, batch in zip(parts, map(inputs.prepare, batches), strict=False):
                own = torch.from_numpy(batch.positions == part)  # leave out images that replace unreadable ones
                made.append(self.model.features_from(batch.features[0], task).cpu()[own])
                labels.append(batch.labels.cpu()[own])
                if time.monotonic() >= until:
                    break
        return Features(torch.cat(made), torch.cat(labels)).checked(task)

    def _progress(self) -> dict[str, dict[str, float]]:
        """Return the progress: every used image was seen once."""
        done, sizes = self.state.step, {task: len(data.train) for task, data in self.tasks.items()}
        for task, result in self.penalties.results.items():
            sizes[task] = result["images"]
        return {
            task: {"updates": done, "images": done * sizes[task], "epochs": done * sizes[task] / len(data.train)}
            for task, data in self.tasks.items()
        }


class Penalties(Callback):
    """Adds the penalties that were tried, with their scores, to the report."""

    name = "penalties"

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        return self.results

    def restore(self, state: dict[str, Any]) -> None:
        self.results = state

    def on_end(self, report: Any) -> dict[str, Any]:
        return {"penalties": self.results} if self.results else {}
