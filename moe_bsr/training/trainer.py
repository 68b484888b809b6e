"""The training loop: draws batches, takes optimizer updates, evaluates, saves checkpoints and emits events.

It is independent of the method. The model determines what trains, drops or routes, the sampler the order of tasks, the
inputs what the model receives, and the callbacks what is done with the metrics.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_bsr.config import Config
from moe_bsr.data import LostData, UnreadableImage
from moe_bsr.data.loader import Batch
from moe_bsr.data.sampler import MultitaskSampler
from moe_bsr.evaluation.evaluate import BATCH, evaluate, scoring
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runs import checkpoint, kept_tasks, report
from moe_bsr.runs import folder as run
from moe_bsr.runtime.device import Runtime
from moe_bsr.runtime.interrupt import Interrupted, RankLost, StopSignals
from moe_bsr.training import length, prototypes
from moe_bsr.training.callback import Callback, EvalEvent, PlanEvent, StartEvent, StepEvent
from moe_bsr.training.failures import NonFiniteLoss, TrainingFailed, explained, last_good, lost
from moe_bsr.training.inputs import Inputs
from moe_bsr.training.optim import MovingAverage, learning_rate, make_optimizer
from moe_bsr.training.pace import Deadline, updates_decided
from moe_bsr.training.state import TrainState
from moe_bsr.training.task_updates import NotFinite, TaskUpdates
from moe_bsr.training.update import BatchResult


class Trainer:
    """Trains one model on its tasks, in one run folder.

    Attributes:
        state: everything that changes while training, and is saved in checkpoints.
        config: the configuration as given. planned: the same with its length in updates.
    """

    def __init__(
        self,
        config: Config,
        model: MultitaskViT,
        inputs: Inputs,
        runtime: Runtime,
        folder: Path,
        callbacks: Iterable[Callback] = (),
        about: Iterable[str] = (),
        costs: dict[str, float | None] | None = None,
    ) -> None:
        """
        Args:
            model: already on the device (`runtime.place`). inputs: training data of all its tasks.
            about: lines that describe the run to the user at its start.
            costs: predicted numbers for the report: predicted_peak_mb, gflops_per_image.
        Raises:
            ValueError: two callbacks have the same name.
        """
        self.config, self.model, self.inputs, self.runtime, self.folder = config, model, inputs, runtime, folder
        self.tasks, self.transforms = inputs.tasks, inputs.transforms
        self.about, self.costs = list(about), costs or {}
        settings = config.train
        self.sizes = {name: len(data.train) for name, data in self.tasks.items()}
        optimizer = make_optimizer(model, settings)
        average = None if settings.ema_decay is None else MovingAverage(model, settings.ema_decay)
        self.updates = TaskUpdates(config, model, inputs, optimizer, average)
        callbacks = [*callbacks, *self.updates.callbacks]
        self.state = TrainState(
            model, optimizer, average, callbacks, settings.checkpoint_selection, settings.save, self.transforms.skipped
        )
        self.callbacks = self.state.callbacks
        self.stop, self.ranks = StopSignals(), runtime.ranks
        self.ranks.listen(self.stop)
        self._plan(length.updates_of(config, self.sizes) or max(length.UNKNOWN, settings.warmup_steps or 0))

    def _plan(self, steps: int) -> None:
        """Set the number of updates, and make the sampler for it."""
        config, earlier = self.config, self.state.length.earlier
        self.planned = length.in_updates(config, steps)
        labels = {name: data.train.labels for name, data in self.tasks.items()}
        self.sampler = MultitaskSampler(
            self.sizes, config.train.batch_size, steps, config.sampler, config.seed, earlier, labels
        )

    def fit(self, resume: bool = False) -> dict[str, Any]:
        """Train to the last step or until a signal, test once, and write and return the report.

        Args:
            resume: continue from the folder's newest intact checkpoint, if there is one.
        Raises:
            ConfigError, CheckpointError: refused before training. TrainingFailed, UnreadableImage: during it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.runtime.reset_peak()
        self.ranks.by_first(self._check_room)
        try:
            self.about += self.ranks.by_first(lambda: self._begin(resume))
            self.state.follow_first(self.ranks)
            self.about += self._decide_length()
            self.ranks.by_first(lambda: self._write_config(resume))
            try:
                return self._fit()
            except RankLost as error:
                raise TrainingFailed(lost(self.folder, self.state.step, error, self.ranks.first)) from error
            except (UnreadableImage, OSError, MemoryError, RuntimeError) as error:
                if isinstance(error, UnreadableImage | LostData):  # the state is from before this update or evaluation
                    self._save()
                if (line := explained(self.folder, self.state.step, error)) is None:
                    raise
                raise TrainingFailed(line) from error
        finally:
            self.callbacks.close()

    def _begin(self, resume: bool) -> list[str]:
        """Resume or begin; returns notes for the user."""
        if not resume:
            self.state.begin()
        notes = self.state.resume(self.folder, self.tasks, self.runtime) if resume else []
        return notes + prototypes.place(self.model, self.inputs, self.config.seed, self.state.average)

    def _write_config(self, resume: bool) -> None:
        run.write_config(self.folder, self.config, self.model, self.transforms, self.runtime, self.tasks, resume)

    def _save(self) -> None:
        if self.ranks.first:
            self.state.save(self.folder)

    def _fit(self) -> dict[str, Any]:
        self._start()
        with self.stop:
            try:
                with contextlib.suppress(Interrupted):  # raised in an evaluation, and everything was saved before
                    self._loop()
                try:
                    scores = self._final_scores()
                except Interrupted:  # raised while testing, and everything was saved before
                    scores = None
            except RankLost:
                self._save()
                raise
        return self.ranks.by_first(lambda: self._end(self._report(scores)))

    def _decide_length(self) -> list[str]:
        """Decide how many updates the run has; returns notes for the user."""
        steps, notes = updates_decided(self)
        self.state.plan(steps, self.config.train.minutes)
        self._plan(steps)
        return notes

    def _check_room(self) -> None:
        """Raise an error if the disk has no space for the run's checkpoints, of which up to three exist at a time."""
        there = checkpoint.steps(self.folder)
        left = self.planned.train.steps - (there[-1] if there else 0)
        if left > 0:
            saves = math.ceil(left / self._checkpoint_every())
            at_once = max(1, checkpoint.KEPT + 1 - len(there))
            checkpoint.check_room(self.folder, self.state.sizes(), min(saves, at_once))

    def _checkpoint_every(self) -> int:
        return self.config.train.checkpoint_every or max(1, self.planned.train.steps // 10)

    def _start(self) -> None:
        shown = (self.about, self.model, self.tasks, self.transforms, self.runtime)
        start = StartEvent(self.folder, self.planned, list(self.tasks), self.state.step, *shown)
        self.callbacks.tell("on_start", start)

    def _loop(self) -> None:
        settings, state, clock = self.planned.train, self.state, time.monotonic()
        checkpoint_every, deadline = self._checkpoint_every(), Deadline(self)
        if state.pending_evaluation or (state.step == settings.steps and state.best is None):
            self._evaluate_and_save()
        self._tell_scores()
        batches = self.batches(state.step)
        while not self._is_over() and not self.ranks.signal:
            self._update(batches)
            if (steps := deadline.steps_after(time.monotonic() - clock)) < settings.steps:
                batches.close()
                self._lower(steps)
                batches, settings = self.batches(state.step), self.planned.train
            due = state.step == settings.steps or (settings.eval_every and state.step % settings.eval_every == 0)
            if self.callbacks.failed is not None:
                state.pending_evaluation = bool(due)
                self._save()
                raise self.callbacks.failed
            if due:
                self._evaluate_and_save()
            elif state.step % checkpoint_every == 0:
                self._save()
            clock = time.monotonic()
        batches.close()
        if state.saved_step != state.step:
            self._save()

    def _lower(self, steps: int) -> None:
        """Lower the number of updates."""
        event = PlanEvent(self.state.step, steps, self.planned.train.steps)
        self.state.plan(steps, self.config.train.minutes)
        self._plan(steps)
        self.callbacks.tell("on_plan", event)

    def batches(self, step: int = 0) -> Iterator[Batch]:
        """Return this process's shares of all batches from update `step` on. Close the iterator when done."""
        settings = self.config.train
        mine, size = self.ranks.mine(settings.grad_accumulation_steps), settings.batch_size
        size //= settings.grad_accumulation_steps
        part = slice(mine.start * size, mine.stop * size)
        return self.inputs.batches(
            (task, positions[part], epochs[part]) for task, positions, epochs in self.sampler.batches(step)
        )

    def _is_over(self) -> bool:
        """Return whether the last update is done, or `train.patience` evaluations in a row had no new best."""
        patience = self.config.train.patience
        return self.state.step >= self.planned.train.steps or (patience is not None and self.state.stale >= patience)

    def _update(self, batches: Iterator[Batch]) -> None:
        """Take one optimizer update, and emit its events."""
        began, settings, state = time.monotonic(), self.planned.train, self.state
        rate, tasks = learning_rate(settings, state.step), self.sampler.tasks(state.step)
        results, norm = self.take(batches, state.step, rate)
        state.step += 1
        progress, exchanged = self._progress(), self.ranks.numbers()
        speed = len(tasks) * settings.batch_size / (time.monotonic() - began)
        for task, result in zip(tasks, results, strict=True):
            metrics = {
                "loss": result.loss,
                "auxiliary_loss": result.auxiliary_loss,
                "accuracy": result.accuracy,
                "lr": rate,
                "gradient_norm": norm,
                **self.updates.learned(task),
                **exchanged,
            }
            event = StepEvent(state.step, task, metrics, progress, result.outputs, speed)
            self.callbacks.tell("on_step", event)

    def _progress(self) -> dict[str, dict[str, float]]:
        """Return updates, images and epochs of each task so far."""
        return self.sampler.progress(self.state.step)

    def take(self, batches: Iterator[Batch], step: int, rate: float) -> tuple[list[BatchResult], float | None]:
        """Take update `step` on a batch of one task, or of each task with joint sampling (see `TaskUpdates.take`)."""
        self.model.train()
        for group in self.state.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"] * (step >= group["hold"])
        drawn = [next(batches) for _ in self.sampler.tasks(step)]  # all before the update: one may be unreadable
        try:
            return self.updates.take(drawn, step)
        except NotFinite as error:
            raise NonFiniteLoss(
                f"{error}; {last_good(self.folder)}; in a new run folder lower train.lr, set train.grad_clip_norm, or "
                "use runtime.precision=fp32"
            ) from None

    def _evaluate(self, split: str) -> dict[str, dict[str, Any]]:
        """Return scores of every task, with the averaged weights if there are any."""
        average = self.state.average
        if average is not None:
            average.swap(self.model)
        try:
            with scoring(self.model), self.ranks.at_once():
                scores = {
                    name: evaluate(self.model, data, split, self.transforms, self.runtime, BATCH, self.ranks)
                    for name, data in self.tasks.items()
                }
                for skipped in self.ranks.gather(self.transforms.skipped):
                    self.state.add_skipped(skipped)
        finally:
            if average is not None:
                average.swap(self.model)
        return scores

    def _evaluate_and_save(self) -> None:
        """Evaluate, and save before and after it, so that an unreadable image or a failing callback loses nothing."""
        state = self.state
        if not state.pending_evaluation:  # otherwise this state was saved already, and the run resumed from it
            state.pending_evaluation = True
            self._save()
        state.add_evaluation(self._evaluate("val"))
        self._save()
        self._tell_scores()

    def _tell_scores(self) -> None:
        """Send the scores of the evaluation at this step to the callbacks, unless they have received them."""
        if (scores := self.state.untold_scores) is not None:
            self._emit(EvalEvent(self.state.step, "val", scores))
            self.state.untold_scores = None

    def _emit(self, evaluation: EvalEvent) -> None:
        self.callbacks.tell("on_evaluate", evaluation)
        if self.callbacks.failed is not None:  # the last checkpoint still has these scores as not sent
            raise self.callbacks.failed

    def _final_scores(self) -> dict[str, Any] | None:
        """Return the scores of the selected weights for the report, or None if the run was interrupted."""
        state = self.state
        if self.ranks.signal:
            return None
        self.ranks.by_first(lambda: state.load_best(self.folder))
        state.follow_first(self.ranks)
        if not self.config.train.evaluate_test:
            return state.best.scores or self._evaluate("val")
        self.ranks.by_first(lambda: run.count_test_evaluation(self.folder))
        scores = self._evaluate("test")
        self._emit(EvalEvent(state.best.step, "test", scores))
        return scores

    def _report(self, scores: dict[str, Any] | None) -> dict[str, Any]:
        state, split = self.state, "test" if self.config.train.evaluate_test else "val"
        return report.make(
            config=self.config,
            runtime=self.runtime,
            status="interrupted" if self.ranks.signal else "finished",
            signal=self.ranks.signal,
            scores=scores,
            split=split,
            progress=self._progress(),
            best=state.best and (state.best.mean_top1, state.best.step),
            val_scores=state.best and state.best.scores,
            kept=kept_tasks.entries(self.config, self.folder, split),
            lost=state.lost and {**dataclasses.asdict(state.lost.best), "reason": state.lost.reason},
            step=state.step,
            planned_steps=self.planned.train.steps,
            skipped=state.skipped,
            weights="live" if state.average is None else "average",
            train_seconds=state.seconds,
            measured_peak_mb=self.runtime.peak_mb(),
            test_evaluations=run.test_evaluations(self.folder),
            predicted_peak_mb=self.costs.get("predicted_peak_mb"),
            gflops_per_image=self.costs.get("gflops_per_image"),
            **self.ranks.report(),
        )

    def _end(self, result: dict[str, Any]) -> dict[str, Any]:
        """Add the callbacks' values to the report, and write it."""
        average = self.state.average
        if average is not None:  # callbacks that look at the model see the weights that were scored
            average.swap(self.model)
        try:
            result = self.callbacks.end(result) | result
        finally:
            if average is not None:
                average.swap(self.model)
        report.write(self.folder, result)
        return result
