"""The one trainer: it draws batches, takes optimizer steps, evaluates, checkpoints and emits records.

It knows no method: what trains, drops or routes is the model's business, which task comes next the
sampler's, and what becomes of the numbers the observers'.
"""

import math
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_bsr import config as configuration
from moe_bsr.callbacks.console import Console
from moe_bsr.callbacks.expert_views import ExpertViews
from moe_bsr.callbacks.jsonl import Jsonl
from moe_bsr.callbacks.tensorboard import TensorBoard
from moe_bsr.config import Config, ConfigError
from moe_bsr.cost.predict import predict
from moe_bsr.data import ImageTransforms, Loader, TaskData, UnreadableImage
from moe_bsr.data.sampler import MultitaskSampler
from moe_bsr.evaluation.evaluate import evaluate
from moe_bsr.model import summary as describe
from moe_bsr.model.multitask import MultitaskViT, build, build_on_meta
from moe_bsr.runs import checkpoint, report
from moe_bsr.runs import folder as run
from moe_bsr.runtime.device import Runtime, prepare
from moe_bsr.runtime.interrupt import Interrupted, StopSignals
from moe_bsr.training.callback import Callback, EvalEvent, StartEvent, StepEvent
from moe_bsr.training.feature_cache import FeatureCache
from moe_bsr.training.optim import MovingAverage, clip_gradients, learning_rate, make_optimizer


class NonFiniteLoss(RuntimeError):
    """Training diverged; the message names the step, the task and the last good checkpoint."""


def train(config: Config, folder: str | Path = "runs/run", resume: bool = False) -> dict[str, Any]:
    """Train as the configuration says, into a run folder, and return its report.

    Args:
        resume: continue from the newest sound checkpoint of the folder, or start if there is none.
    Raises:
        ConfigError: an impossible configuration, or a folder that holds another run.
        NonFiniteLoss: the loss or the gradient became infinite or NaN.
        FloatingPointError: an evaluation met logits that are.
    """
    folder = Path(folder)
    runtime = prepare(config.runtime)
    run.check_folder(config, folder, resume)
    build_on_meta(config, dict.fromkeys(config.task_names(), 2))  # what cannot be is refused before data are opened
    if resume and (done := report.read(folder)) is not None and done["status"] == "finished":
        return done
    if config.mode == "single_task":
        return _train_each(config, folder, resume)
    tasks = {name: run.open_task(config, file) for name, file in config.task_files().items()}
    model = build(config, {name: len(data.class_names) for name, data in tasks.items()})
    return Trainer(config, runtime.place(model), tasks, runtime, folder).fit(resume)


def _train_each(config: Config, folder: Path, resume: bool) -> dict[str, Any]:
    """One complete run per task; finished ones are not repeated on resume."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_whole(folder / "config.yaml", configuration.dump(config))
    parts: dict[str, dict[str, Any]] = {}
    names = config.task_names()
    for name in names:
        parts[name] = train(config.of_task(name), folder / name, resume)
        whole = report.aggregate(parts, names)
        report.write(folder, whole)
        if parts[name]["status"] != "finished":
            break
    return whole


class Trainer:
    """One model, its tasks and one run folder."""

    def __init__(
        self,
        config: Config,
        model: MultitaskViT,
        tasks: dict[str, TaskData],
        runtime: Runtime,
        folder: Path,
        callbacks: list[Callback] | None = None,
    ) -> None:
        self.config, self.model, self.tasks, self.runtime, self.folder = config, model, tasks, runtime, folder
        settings = config.train
        self.transforms: ImageTransforms = run.make_transforms(config, model)
        self.feature_cache: FeatureCache | None = None
        if config.data.feature_cache_mb:
            with runtime.autocast():
                self.feature_cache = FeatureCache(
                    model, {t: len(d.train) for t, d in tasks.items()}, config.data.feature_cache_mb
                )
        self.sampler = MultitaskSampler(
            {name: len(data.train) for name, data in tasks.items()},
            settings.batch_size,
            settings.steps,
            config.sampler,
            config.seed,
        )
        self.optimizer = make_optimizer(model, settings, len(model.plan))
        try:
            self.predicted = predict(
                model,
                config,
                batch=settings.batch_size // settings.grad_accumulation_steps,
                precision=runtime.precision,
                all_tasks=True,
            )
        except ConfigError:  # a part that states no cost may train all the same
            self.predicted = None
        self.average = None if settings.ema_decay is None else MovingAverage(model, settings.ema_decay)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        mean_weight = sum(settings.task_weights.get(t, 1.0) for t in tasks) / len(tasks)
        self.weights = {t: settings.task_weights.get(t, 1.0) / mean_weight for t in tasks}
        board = TensorBoard(folder)
        self.callbacks = callbacks if callbacks is not None else [Console(), Jsonl(folder), board, ExpertViews(board)]
        self.best: tuple[float, int] | None = None  # mean validation top-1, step
        self.best_scores: dict[str, dict[str, Any]] | None = None  # unknown after a resume
        self.step = 0
        self.stop = StopSignals()
        self.seconds = 0.0
        self.saved_step = -1

    def fit(self, resume: bool = False) -> dict[str, Any]:
        """Train to the last step (or a signal), test once, write and return the report."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.runtime.reset_peak()
        pending, about = self._restore(resume)
        run.write_config(self.folder, self.config, self.model, self.transforms, self.runtime, self.tasks)
        start = StartEvent(
            self.folder,
            self.config,
            list(self.tasks),
            self.step,
            [*self._about(), *about],
            self.model,
            self.tasks,
            self.transforms,
            self.runtime,
        )
        for callback in self.callbacks:
            callback.on_start(start)
        try:
            with self.stop:
                try:
                    self._loop(pending)
                except Interrupted:
                    self._save(pending_evaluation=True)
                try:
                    result = self._report()
                except Interrupted:  # while testing, when everything had been saved
                    result = self._report()
            try:
                for callback in self.callbacks:
                    callback.on_end(result)
            finally:  # a picture that cannot be drawn must not cost the result
                report.write(self.folder, result)
        finally:
            for callback in self.callbacks:
                callback.close()
        return result

    def _loop(self, pending: bool) -> None:
        settings, clock = self.config.train, time.monotonic()
        checkpoint_every = settings.checkpoint_every or max(1, settings.steps // 10)
        if pending:
            self._evaluate_and_save()
        batches = iter(
            Loader(
                self.tasks,
                self.transforms,
                self.sampler.batches(self.step),
                self.config.data.prefetch,
                self.feature_cache and self.feature_cache.know,
            )
        )
        while self.step < settings.steps and not self.stop.number:
            try:
                self._update(batches)
            except UnreadableImage:  # nothing of this update has been done yet
                if self.saved_step != self.step:
                    self._save()
                raise
            self.seconds += time.monotonic() - clock
            if self.step == settings.steps or (settings.eval_every and self.step % settings.eval_every == 0):
                self._evaluate_and_save()
            elif self.step % checkpoint_every == 0:
                self._save()
            clock = time.monotonic()
        batches.close()
        if self.saved_step != self.step:
            self._save()

    def _update(self, batches: Iterator) -> None:
        """One optimizer update: one batch of one task, or of each task when sampling jointly."""
        began, settings = time.monotonic(), self.config.train
        self.model.train()
        rate = learning_rate(settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        tasks = self.sampler.tasks(self.step)
        drawn = [next(batches) for _ in tasks]  # before anything is done: an image may be unreadable
        done = []
        for index, (task, *batch) in enumerate(drawn):
            share = self.weights[task] / len(tasks)
            done.append((task, *self._backward(task, *batch, share, index * settings.grad_accumulation_steps)))
        norm = self._clip()
        if not math.isfinite(norm):
            self._refuse(f"gradient norm {norm}", ", ".join(tasks))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        self.step += 1
        progress = self.sampler.progress(self.step)
        speed = len(tasks) * settings.batch_size / (time.monotonic() - began)
        for task, metrics, outputs in done:
            record = StepEvent(self.step, task, metrics | {"lr": rate, "gradient_norm": norm}, progress, outputs, speed)
            for callback in self.callbacks:
                callback.on_step(record)

    def _backward(
        self, task: str, positions: np.ndarray, images: Tensor | None, labels: Tensor, share: float, first_micro: int
    ) -> tuple[dict[str, float], list]:
        """Accumulate the gradient of one batch, in micro-batches of equal size."""
        settings, outputs = self.config.train, []
        sums = np.zeros(3)  # loss, auxiliary loss, images right
        size = len(labels) // settings.grad_accumulation_steps
        for micro in range(settings.grad_accumulation_steps):
            part = slice(micro * size, (micro + 1) * size)
            inputs = None if images is None else self.transforms.normalize(images[part], device=self.runtime.device)
            targets = labels[part].to(self.runtime.device)
            forward_features = self.feature_cache and partial(self.feature_cache.of, positions=positions[part])
            with self.runtime.autocast():
                output = self.model(inputs, task, (self.config.seed, self.step, first_micro + micro), forward_features)
            loss = self.criterion(output.logits.float(), targets)
            (share / settings.grad_accumulation_steps * (loss + output.auxiliary_loss)).backward()
            self.model.commit(output, task)
            outputs.append(output)
            right = (output.logits.detach().argmax(1) == targets).sum()
            # In one tensor: a GPU is waited for once.
            sums += torch.stack([loss.detach(), output.auxiliary_loss.detach(), right.float()]).tolist()
        loss, auxiliary, correct = sums.tolist()
        loss, auxiliary = loss / settings.grad_accumulation_steps, auxiliary / settings.grad_accumulation_steps
        if not math.isfinite(loss + auxiliary):
            self._refuse(f"loss {loss} (auxiliary {auxiliary})", task)
        return {"loss": loss, "auxiliary_loss": auxiliary, "accuracy": correct / len(labels)}, outputs

    def _clip(self) -> float:
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return clip_gradients(trained, self.config.train.grad_clip_norm)

    def _refuse(self, what: str, task: str) -> None:
        saved = checkpoint.steps(self.folder)
        good = self.folder / "checkpoint" / str(saved[-1]) if saved else "none was written yet"
        raise NonFiniteLoss(
            f"{what} at step {self.step + 1}, task {task}; last good checkpoint: {good}; "
            "in a new --run lower train.lr, set train.grad_clip_norm, or use runtime.precision=fp32"
        )

    def _evaluate(self, split: str) -> dict[str, dict[str, Any]]:
        """Scores of every task; the averaged weights are scored if there are any."""
        if self.average is not None:
            self.average.swap(self.model)
        try:
            with self.stop.at_once():
                return {
                    name: evaluate(self.model, data, split, self.transforms, self.runtime)
                    for name, data in self.tasks.items()
                }
        finally:
            if self.average is not None:
                self.average.swap(self.model)

    def _evaluate_and_save(self) -> None:
        scores = self._evaluate("val")
        mean = sum(s["top1"] for s in scores.values()) / len(scores)
        if self.config.train.checkpoint_selection == "last" or self.best is None or mean > self.best[0]:
            self.best, self.best_scores = (mean, self.step), scores
        for callback in self.callbacks:
            callback.on_evaluate(EvalEvent(self.step, "val", scores))
        self._save()

    def _save(self, pending_evaluation: bool = False) -> None:
        saved = self.model.state_dict()
        if self.config.train.save == "trainable":
            reference = self.model.unchanged_backbone_names()
            saved = {name: value for name, value in saved.items() if name not in reference}
        names = {
            p: n for group in self.optimizer.param_groups for p, n in zip(group["params"], group["names"], strict=True)
        }
        moments = {
            f"{names[p]}/{key}": value
            for p, values in self.optimizer.state.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        tensors = {"weights": saved, "optimizer": moments}
        if self.average is not None:
            tensors["average"] = self.average.average
        state = {
            "step": self.step,
            "pending_evaluation": pending_evaluation,
            "seconds": self.seconds,
            "best_step": self.best and self.best[1],
            "best_mean_top1": self.best and self.best[0],
            "callbacks": {type(o).__name__: o.state() for o in self.callbacks},
        }
        checkpoint.save(self.folder, self.step, tensors, state)
        self.saved_step = self.step

    def _restore(self, resume: bool) -> tuple[bool, list[str]]:
        """Continue from the newest sound checkpoint, if asked to and there is one."""
        notes: list[str] = []
        state: dict[str, Any] = {}
        if resume:
            checkpoint.recover(self.folder)
            if not checkpoint.steps(self.folder) and (self.folder / "config.yaml").is_file():
                notes.append(f"no checkpoint to resume from in {self.folder}: starting at the first step")
        if resume and checkpoint.steps(self.folder):
            place = checkpoint.latest(self.folder, warn=notes.append)
            tensors, state = checkpoint.read(place)
            resolved = run.read_config(self.folder)[1]
            run.check_data(self.folder, resolved["tasks"], self.tasks)
            self._load(tensors, resolved["backbone_sha256"], place)
            self.step, self.seconds = state["step"], state["seconds"]
            self.saved_step = self.step
            if state["best_step"] is not None:
                self.best = (state["best_mean_top1"], state["best_step"])
            notes.append(f"resumed from {place}")
            now = run.environment(self.runtime)
            changed = [
                f"{key} was {resolved[key]}, now {value}" for key, value in now.items() if resolved.get(key) != value
            ]
            if changed:
                notes.append(f"not bit-exact with the run so far: {'; '.join(changed)}")
        for callback in self.callbacks:
            callback.restore(state.get("callbacks", {}).get(type(callback).__name__, {}))
        return state.get("pending_evaluation", False), notes

    def _load(self, tensors: dict[str, dict[str, Tensor]], backbone_sha256: str, place: Path) -> None:
        run.restore_weights(self.model, tensors["weights"], backbone_sha256, place)
        if self.average is not None:
            for name, held in self.average.average.items():
                held.copy_(tensors["average"][name])
        parameters = dict(self.model.named_parameters())
        for name, value in tensors["optimizer"].items():
            name, _, key = name.rpartition("/")
            self.optimizer.state[parameters[name]][key] = value.to(parameters[name].device)

    def _report(self) -> dict[str, Any]:
        """The report; a run that reached its end is tested first, with the weights selected."""
        split = "test" if self.config.train.evaluate_test else "val"
        scores = None
        if not self.stop.number:
            self._select_best()
            if split == "test":
                run.count_test_evaluation(self.folder)
                scores = self._evaluate(split)
                for callback in self.callbacks:
                    callback.on_evaluate(EvalEvent(self.step, split, scores))
            else:
                scores = self.best_scores or self._evaluate(split)
        return report.make(
            status="interrupted" if self.stop.number else "finished",
            signal=self.stop.number,
            scores=scores,
            split=split,
            progress=self.sampler.progress(self.step),
            step=self.step,
            best=self.best,
            weights="live" if self.average is None else "average",
            train_seconds=self.seconds,
            predicted_peak_mb=self.predicted and self.predicted.peak / 2**20,
            measured_peak_mb=self.runtime.peak_mb(),
            test_evaluations=run.test_evaluations(self.folder),
            gflops_per_image=describe.forward_gflops(self.model),
        )

    def _select_best(self) -> None:
        """Put the weights with the best mean validation top-1 into the model."""
        if self.best[1] == self.step:
            return
        try:
            tensors, _ = checkpoint.read(self.folder / "checkpoint" / str(self.best[1]))
        except checkpoint.CheckpointError as error:
            warnings.warn(f"{error}; the last weights are reported in place of the best", stacklevel=2)
            self.best = (None, self.step)
            return
        self.model.load_state_dict(tensors["weights"], strict=False)
        if self.average is not None:
            for name, value in tensors["average"].items():
                self.average.average[name].copy_(value)

    def _about(self) -> list[str]:
        sizes = ", ".join(f"{n} {len(d.train)}/{len(d.val)}/{len(d.test)}" for n, d in self.tasks.items())
        settings = self.config.train
        cost = (
            self.predicted.summary(settings.batch_size // settings.grad_accumulation_steps)
            if self.predicted
            else "no predicted cost: a part of this backbone states none"
        )
        return [
            *describe.summary(self.model, self.config),
            f"train/val/test images: {sizes}",
            f"{settings.steps} updates of {settings.batch_size} images "
            f"({self.config.sampler.kind}); {self.runtime.precision} ({self.runtime.precision_reason}), "
            f"{self.runtime.threads} threads on {self.runtime.device}; run folder {self.folder}",
            cost,
            *([str(self.feature_cache)] if self.feature_cache else []),
        ]
