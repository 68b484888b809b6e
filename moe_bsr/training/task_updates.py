"""Optimizer updates on a batch of one task, or on one batch per task whose gradients are combined.

If several processes train, they share each batch. They exchange everything before the optimizer's step, so an update in
which a process is lost changes nothing.
"""

import contextlib
import math

import torch

from moe_bsr.config import Config
from moe_bsr.data.loader import Batch
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.interrupt import RankLost
from moe_bsr.training.alast import schedule_of
from moe_bsr.training.class_weights import balanced
from moe_bsr.training.inputs import Inputs
from moe_bsr.training.mixing import Mixing
from moe_bsr.training.optim import MovingAverage, names_of
from moe_bsr.training.pcgrad import PCGrad
from moe_bsr.training.update import BatchResult, accumulate, multitask_update, task_weights


class NotFinite(FloatingPointError):
    """A loss or a gradient is infinite or NaN. The message names it and the task."""


class TaskUpdates:
    """Takes the updates of one model, with the configured weighting of tasks, classes and images.

    Attributes:
        names: parameter names by parameter. weights: relative loss weights by task.
        schedule: selects the blocks that train in an update (ALaST), or None.
        callbacks: callbacks that the trainer must call for each update.
    """

    def __init__(
        self, config: Config, model: MultitaskViT, inputs: Inputs, optimizer, average: MovingAverage | None
    ) -> None:
        """
        Args:
            inputs: training data of all tasks of the model.
        """
        self.config, self.inputs = config, inputs
        settings, tasks = config.train, inputs.tasks
        classes = {task: len(data.class_names) for task, data in tasks.items()}
        of_classes = None
        if settings.class_weights == "balanced":
            device = inputs.runtime.device
            of_classes = {task: balanced(data.train.labels, classes[task]).to(device) for task, data in tasks.items()}
        self.ranks = inputs.runtime.ranks
        self.update = multitask_update(model, settings, inputs.runtime, optimizer, average, of_classes, commits=False)
        self.names = names_of(optimizer)
        self.weights = task_weights(list(tasks), settings)
        self.mixing = Mixing(settings, classes) if settings.mixup or settings.cutmix else None
        self.schedule = schedule_of(model, config, self.ranks)
        self.callbacks = [] if self.schedule is None else [self.schedule]
        self.pcgrad = PCGrad() if settings.task_weighting == "pcgrad" else None

    def take(self, batches: list[Batch], step: int) -> tuple[list[BatchResult], float | None]:
        """Take one update. Returns the result of each batch, and the gradient norm before clipping if it is measured.

        Args:
            batches: this process's shares of the batches, each of a different task.
            step: number of updates done before. It seeds gate noise, mixtures and the order of PCGrad.
        Raises:
            NotFinite: nothing has been updated, except with steps in the backward pass.
            RankLost: nothing has been updated.
        """
        before = {}
        if self.ranks.world > 1:  # to undo the update if another process is lost
            running = self.update.model.balance.state_dict()
            before = {name: value.clone() for name, value in running.items()}
        results = []
        try:
            for place, batch in enumerate(batches):
                results.append(self._backward(batch, place, len(batches), step))
                if self.pcgrad is not None:
                    self.ranks.sum_gradients(self.update.trained, self.names)
                    self.pcgrad.keep(self.update.trained)
            if self.pcgrad is not None:
                self.update.trained = self.pcgrad.combine((self.config.seed, step))
            else:
                self.ranks.sum_gradients(self.update.trained, self.names)
        except RankLost:
            self.update.model.balance.load_state_dict(before)
            raise
        try:
            norm = self.update.step()
        except FloatingPointError as error:
            raise NotFinite(f"{error} at step {step + 1}, task {', '.join(b.task for b in batches)}") from None
        self.update.clear()
        return results, norm

    def learned(self, task: str) -> dict[str, float]:
        """Return the learned loss weight of a task, and the budgets of its blocks (ALaST), if there are any."""
        log_variances = self.update.model.log_variances
        weight = {"task_weight": math.exp(-log_variances[task].item())} if task in log_variances else {}
        return weight if self.schedule is None else weight | self.schedule.numbers(task)

    def _backward(self, batch: Batch, place: int, tasks: int, step: int) -> BatchResult:
        """Compute the gradient of batch number `place` out of `tasks` in this update."""
        micro_batches = self.config.train.grad_accumulation_steps
        with contextlib.nullcontext() if self.schedule is None else self.schedule.update(step, batch.task):
            result = accumulate(
                self.update,
                batch,
                micro_batches,
                share=self.weights[batch.task] / tasks,
                noise_key=(self.config.seed, step),
                first=place * micro_batches,
                prepare=self.inputs.prepare,
                mix=self.mixing,
                ranks=self.ranks,
            )
        if not math.isfinite(result.loss + result.auxiliary_loss):
            loss = f"loss {result.loss} (auxiliary {result.auxiliary_loss})"
            raise NotFinite(f"{loss} at step {step + 1}, task {batch.task}")
        self._commit(result, batch.task)
        return result

    def _commit(self, result: BatchResult, task: str) -> None:
        """Fold all micro-batches into the balance loss's running shares, in order and after their own losses."""
        balance = self.update.model.balance
        if balance.kind == "across_tasks" and balance.blocks:
            mine = torch.stack([balance.shares(output.routing) for output in result.outputs])
            for shares in self.ranks.gather_rows(mine):
                balance.fold(shares, task)
