"""Training by `train.optimizer: lbfgs`: a linear probe of each task, which is the one update of its run.

The rest is the trainer's: the run folder, evaluation, the one test, the report. So a probe is a run like any other.
With `train.minutes` it takes as many training images as their features take so long, equally many of each class.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from moe_bsr.config import Config, DataConfig, SamplerConfig
from moe_bsr.config.alast import AlastConfig
from moe_bsr.config.schema import AUGMENT_KEYS
from moe_bsr.data import TaskData
from moe_bsr.data.loader import Batch
from moe_bsr.data.splits import class_by_class
from moe_bsr.data.task import Split
from moe_bsr.evaluation.features import Features, split_features
from moe_bsr.runtime.rng import key, stream
from moe_bsr.training.callback import Callback, StepEvent
from moe_bsr.training.feature_cache import CachedInputs
from moe_bsr.training.linear_probe import Probe, fit
from moe_bsr.training.trainer import Trainer

# What says how training images are seen, and what is kept of them.
FORM_KEYS = ("views", "crop_scale", "hflip", "feature_cache_mb", "feature_cache", "feature_cache_dir", *AUGMENT_KEYS)


def probe_config(config: Config, head_blocks: Iterable[int] | None = None) -> Config:
    """The linear probe of a configuration: its backbone, tasks and dropping; no block trains, none has experts.

    Args:
        head_blocks: in place of the configuration's `plan.head_blocks`.
    """
    blocks = config.plan.head_blocks if head_blocks is None else list(head_blocks)
    return replace(
        config,
        mode="multitask",  # heads know nothing of each other, so one model is as good
        storage="exact",
        adapter=None,
        plan=replace(config.plan, train_blocks=[], moe_blocks=[], head_blocks=blocks),
        sampler=SamplerConfig(),
        data=unaugmented(config.data),
        train=replace(
            config.train,
            optimizer="lbfgs",
            step_in_backward=False,
            alast=AlastConfig(),
            steps=1 if config.train.minutes is None else None,
            epochs=None,
            patience=None,
            only=None,
            init_from=None,
            warmup_steps=None,
            eval_every=None,
            ema_decay=None,
            mixup=0.0,
            cutmix=0.0,
            class_weights="none",
            task_weighting="fixed",
            grad_accumulation_steps=1,
        ),
    )


def unaugmented(data: DataConfig) -> DataConfig:
    """The same data, each image always seen as for evaluation, and nothing kept of it."""
    changes = {key: field.default for key, field in DataConfig.__dataclass_fields__.items() if key in FORM_KEYS}
    return replace(data, **changes | {"augment": False})


class ProbeTrainer(Trainer):
    """A trainer whose one update solves all heads."""

    def __init__(self, *arguments: Any, callbacks: Iterable[Callback] = (), **keywords: Any) -> None:
        self.penalties, self.used, self.validating = Penalties(), {}, 0.0  # seconds for validation images
        super().__init__(*arguments, callbacks=[*callbacks, self.penalties], **keywords)

    def _update(self, batches: Iterator[Batch]) -> None:
        settings, began = self.config.train, time.monotonic()
        self.model.eval()
        with self.stop.at_once():  # no head changes before all are known
            probes = self._solve_all()
        with torch.no_grad():
            for task, probe in probes.items():
                self.model.heads[task].weight.copy_(probe.weight)
                self.model.heads[task].bias.copy_(probe.bias)
        self.state.step += 1
        self.penalties.told = {
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
        """One update, however long."""
        self.state.plan(1, self.config.train.minutes)
        self._plan(1)
        return []

    def _solve_all(self) -> dict[str, Probe]:
        """Every task's probe. Of the minutes each task has its share, and what smaller ones leave over.

        Validation images come on top: in a short time they would leave none for those that train.
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
            data = replace(data, train=_reordered(split, order))
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
        """The features of training images by way of the feature cache, which has them from then on."""
        size, made, labels = self.config.train.batch_size, [], []
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        plan = ((task, part, np.zeros_like(part)) for part in parts)
        with contextlib.closing(inputs.batches(plan)) as batches, torch.inference_mode(), self.runtime.autocast():
            for part, batch in zip(parts, map(inputs.prepare, batches), strict=False):
                own = torch.from_numpy(batch.positions == part)  # another stands for one that was skipped
                made.append(self.model.features_from(batch.features[0], task).cpu()[own])
                labels.append(batch.labels.cpu()[own])
                if time.monotonic() >= until:
                    break
        return Features(torch.cat(made), torch.cat(labels)).checked(task)

    def _progress(self) -> dict[str, dict[str, float]]:
        """Each image that was used was seen once."""
        done, sizes = self.state.step, {task: len(data.train) for task, data in self.tasks.items()}
        for task, told in self.penalties.told.items():
            sizes[task] = told["images"]
        return {
            task: {"updates": done, "images": done * sizes[task], "epochs": done * sizes[task] / len(data.train)}
            for task, data in self.tasks.items()
        }


def _reordered(split: Split, order: np.ndarray) -> Split:
    places = {int(position): place for place, position in enumerate(order)}
    gone = {places[position]: name for position, name in split.gone.items()}
    return replace(split, index=split.index[order], labels=split.labels[order], gone=gone)


class Penalties(Callback):
    """Puts the penalties that were tried, and what each came to, into the report."""

    name = "penalties"

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        return self.told

    def restore(self, state: dict[str, Any]) -> None:
        self.told = state

    def on_end(self, report: Any) -> dict[str, Any]:
        return {"penalties": self.told} if self.told else {}
