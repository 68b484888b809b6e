"""Training by `train.optimizer: lbfgs`: a linear probe of each task, which is the one update of its run.

The rest is the trainer's: the run folder, evaluation, the one test, the report. So a probe is a run like any other.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from moe_bsr.config import Config, SamplerConfig
from moe_bsr.data import TaskData
from moe_bsr.data.loader import Batch
from moe_bsr.evaluation.features import split_features
from moe_bsr.training.callback import Callback, StepEvent
from moe_bsr.training.linear_probe import Probe, fit
from moe_bsr.training.trainer import Trainer


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
        data=replace(config.data, augment=False, crop_scale=None, hflip=None, feature_cache_mb=None),
        train=replace(
            config.train,
            optimizer="lbfgs",
            steps=1,
            epochs=None,
            minutes=None,
            patience=None,
            init_from=None,
            warmup_steps=None,
            eval_every=None,
            ema_decay=None,
            grad_accumulation_steps=1,
        ),
    )


class ProbeTrainer(Trainer):
    """A trainer whose one update solves all heads."""

    def __init__(self, *arguments: Any, callbacks: Iterable[Callback] = (), **keywords: Any) -> None:
        self.penalties = Penalties()
        super().__init__(*arguments, callbacks=[*callbacks, self.penalties], **keywords)

    def _update(self, batches: Iterator[Batch]) -> None:
        settings, began = self.config.train, time.monotonic()
        self.model.eval()
        with self.stop.at_once():  # no head changes before all are known
            probes = {task: self._solve(data) for task, data in self.tasks.items()}
        with torch.no_grad():
            for task, probe in probes.items():
                self.model.heads[task].weight.copy_(probe.weight)
                self.model.heads[task].bias.copy_(probe.bias)
        self.state.step += 1
        self.penalties.told = {
            task: {"chosen": probe.chosen.penalty, "path": [asdict(each) for each in probe.path]}
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

    def _solve(self, data: TaskData) -> Probe:
        def make(images: torch.Tensor) -> torch.Tensor:
            tokens, _ = self.model.forward_features(images, data.name, upto=len(self.model.plan))
            return self.model.features(tokens)

        settings = self.config.train
        train, val = (
            split_features(make, data, split, self.transforms, self.runtime, settings.batch_size)
            for split in ("train", "val")
        )
        return fit(train, val, len(data.class_names), settings.penalty, settings.label_smoothing)

    def _progress(self) -> dict[str, dict[str, float]]:
        """Each image was seen once."""
        done = self.state.step
        return {
            task: {"updates": done, "images": done * len(data.train), "epochs": float(done)}
            for task, data in self.tasks.items()
        }


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
