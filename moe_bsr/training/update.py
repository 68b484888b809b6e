"""One optimizer update: forward and backward passes of the micro-batches, clipping, optimizer step, moving average.

The trainer, the cost tracer, the memory measurement and the benchmark all run this code. It is divided into phases,
which can be traced and measured one by one:

    for micro_batch in micro_batches:
        update.forward(micro_batch, share=1 / len(micro_batches))
        update.backward()
    norm = update.step()
    update.clear()
"""

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_bsr.config import Config, TrainConfig
from moe_bsr.data.loader import Batch
from moe_bsr.model.multitask import MultitaskViT, Output
from moe_bsr.runtime.device import Runtime
from moe_bsr.runtime.distributed import Alone
from moe_bsr.training.drawn_blocks import settle
from moe_bsr.training.mezo import MeZO, estimator_of
from moe_bsr.training.optim import MovingAverage, clip_gradients, clip_groups, make_optimizer
from moe_bsr.training.step_in_backward import StepInBackward


class OptimizerUpdate:
    """One optimizer update of any model, in phases.

    Attributes:
        output: the model's output in the last forward phase.
        terms: the terms of its loss, scalars. loss: their sum. Both are None after the backward phase.
        trained: parameters with a gradient after the last backward phase; `step` clips these.
        stepper: takes the optimizer step in the backward phase; None without `in_backward`.
        estimator: estimates gradients without a backward pass (MeZO), or None.
    """

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        optimizer: Optimizer | None,
        *,
        output: Callable[..., Any],
        loss: Callable[..., Tensor | tuple[Tensor, ...]],
        commit: Callable[..., None] | None = None,
        clip_norm: float | None = None,
        clip_group: Callable[[nn.Parameter], Hashable] | None = None,
        average: MovingAverage | None = None,
        in_backward: bool = False,
        estimator: MeZO | None = None,
    ) -> None:
        """
        Args:
            optimizer: None if only the forward and backward phases are run.
            output: runs the model's forward pass on the inputs given to `forward`, under autocast.
            loss: maps that output and the inputs to a scalar, or to several terms to add. Called outside autocast.
            commit: called once with the output and the inputs after the backward pass.
            clip_norm: largest global norm of the gradients. inf: only measure the norm. None: do not measure it.
            clip_group: maps parameters to groups, each of which is clipped by itself. None: all are one group.
            average: moving average of the weights, updated after each step.
            in_backward: whether the backward phase also takes the optimizer step. It clips `clip_group`s only.
            estimator: replaces the backward pass. The last of the inputs must then be the noise key.
        """
        self.model, self.runtime, self.optimizer = model.train(), runtime, optimizer
        self._output, self._loss, self._commit = output, loss, commit
        self._clip_norm, self._clip_group, self._average = clip_norm, clip_group, average
        self.estimator, self.stepper = estimator, None
        if in_backward and optimizer is not None:
            self.stepper = StepInBackward(optimizer, clip_norm, clip_group or id)
        self._inputs: tuple = ()
        self._share = 1.0
        self.output: Any = None
        self.terms: tuple[Tensor, ...] | None = None
        self.loss: Tensor | None = None
        self.trained: list[nn.Parameter] = []

    def forward(self, *inputs: Any, share: float = 1.0) -> None:
        """Run one micro-batch up to its loss, which has the weight `share` in the loss of the update."""
        run = functools.partial(self._pass, *inputs)
        self.output, self.terms = run() if self.estimator is None else self.estimator.look(run, inputs, share)
        self.loss = functools.reduce(operator.add, self.terms)
        self._inputs, self._share = inputs, share

    def _pass(self, *inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """Return the model's output and the terms of its loss."""
        with self.runtime.autocast():
            output = self._output(*inputs)
        terms = self._loss(output, *inputs)
        return output, terms if isinstance(terms, tuple) else (terms,)

    def backward(self) -> None:
        """Run the backward pass, which adds this micro-batch's gradient to those before it."""
        if self.estimator is None:
            loss = self._share * self.loss
            with contextlib.nullcontext() if self.stepper is None else self.stepper.active(loss):
                loss.backward()
        self.loss = self.terms = None
        if self._commit is not None:
            self._commit(self.output, *self._inputs)
        self._inputs = ()
        groups = self.optimizer.param_groups if self.optimizer else [{"params": self.model.parameters()}]
        self.trained = [p for group in groups for p in group["params"] if p.grad is not None]

    def step(self) -> float | None:
        """Clip the gradients, take the optimizer step, reset the gradients, and update the moving average.

        Returns:
            The global gradient norm before clipping; None if `clip_norm` is None.
        Raises:
            FloatingPointError: that norm is not finite. No weight has changed, except with `in_backward`.
        """
        norm = None
        if self._clip_norm is not None:
            norm = self._norm()
            if not math.isfinite(norm):
                raise FloatingPointError(f"gradient norm {norm}")
        if self.estimator is not None:
            self.estimator.step()
        elif self.stepper is None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update(self.model)
        return norm

    def _norm(self) -> float:
        """Clip the gradients; returns their global norm before that."""
        if self.estimator is not None:
            return self.estimator.clip(self._clip_norm)
        if self.stepper is not None:
            return self.stepper.norm()
        return clip_gradients(self.trained, self._clip_norm, self._clip_group)

    def clear(self) -> None:
        """Release the last micro-batch's output."""
        self.output = self.loss = self.terms = None
        self._inputs = ()


# --- the update of our model ---


def multitask_update(
    model: MultitaskViT,
    config: TrainConfig,
    runtime: Runtime,
    optimizer: Optimizer,
    average: MovingAverage | None = None,
    class_weights: dict[str, Tensor] | None = None,
    commits: bool = True,
) -> OptimizerUpdate:
    """Return the update of our model. Its forward phase takes a prepared `Batch` and a noise key.

    Args:
        class_weights: (classes of the task,) by task, on the device; None: all classes count 1.
        commits: whether each micro-batch updates the running statistics; if not, the caller does it.
    """
    parts = _multitask_parts(model, config, optimizer, class_weights) | ({} if commits else {"commit": None})
    return OptimizerUpdate(model, runtime, optimizer, average=average, **parts)


def _multitask_parts(
    model: MultitaskViT, config: TrainConfig, optimizer: Optimizer, class_weights: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
        targets = batch.labels if batch.targets is None else batch.targets
        if class_weights is None:
            return criterion(logits, targets)
        # Divide by the number of images. torch's mean divides by the sum of weights, which depends on the micro-batch.
        total = nn.functional.cross_entropy(
            logits, targets, class_weights[batch.task], reduction="sum", label_smoothing=config.label_smoothing
        )
        return total / len(batch)

    def output(batch: Batch, noise_key: tuple[int, ...]) -> Output:
        if batch.features is None:
            return model(batch.images, batch.task, noise_key)
        tokens, records = batch.features
        return model.forward_from(tokens, batch.task, noise_key, records)

    def loss(output: Output, batch: Batch, noise_key: tuple[int, ...]) -> tuple[Tensor, ...]:
        entropy = cross_entropy(output.logits.float(), batch)
        if config.task_weighting != "uncertainty":
            return entropy, output.auxiliary_loss
        # Kendall et al. 2018, for classification: L / variance + log of the standard deviation. The first two terms
        # are reported as they are, so the weighting is added as a term of its own.
        log_variance = model.log_variances[batch.task]
        return entropy, output.auxiliary_loss, entropy * torch.expm1(-log_variance) + log_variance / 2

    return {
        "output": output,
        "loss": loss,
        "commit": lambda output, batch, noise_key: model.commit(output, batch.task),
        "in_backward": config.step_in_backward,
        "estimator": estimator_of(model, config, optimizer),
        "clip_norm": math.inf if config.grad_clip_norm is None else config.grad_clip_norm,
        "clip_group": clip_groups(model, config),
    }


def task_weights(tasks: list[str], config: TrainConfig) -> dict[str, float]:
    """Return each task's `train.task_weights` (default 1), divided by their mean."""
    weights = [config.task_weights.get(task, 1.0) for task in tasks]
    mean = sum(weights) / len(tasks)
    return {task: weight / mean for task, weight in zip(tasks, weights, strict=True)}


class BatchResult(NamedTuple):
    """Result of a batch after its backward phases: means over its micro-batches, and the model's outputs.

    Attributes:
        accuracy: share of images whose largest logit was the label's, in [0, 1].
        outputs: one per micro-batch of this process.
    """

    loss: float
    auxiliary_loss: float
    accuracy: float
    outputs: list[Output]


def accumulate(
    update: OptimizerUpdate,
    batch: Batch,
    micro_batches: int,
    *,
    share: float,
    noise_key: tuple[int, ...],
    first: int = 0,
    prepare: Callable[[Batch], Batch],
    mix: Callable[[Batch, tuple[int, ...]], Batch] | None = None,
    ranks: Alone | None = None,
) -> BatchResult:
    """Run the forward and backward phases of a batch in micro-batches of equal size (gradient accumulation).

    Args:
        update: one from `multitask_update`.
        batch: this process's share of the batch. micro_batches: number for the whole batch.
        share: weight of the batch in the loss of the update.
        noise_key: noise key of the update, to which the number of the micro-batch is appended. first: the first number.
        prepare: turns a micro-batch from the loader into what the model takes, on its device.
        mix: mixes the images and labels of a prepared micro-batch.
        ranks: the processes that share the batch.
    """
    ranks = ranks or Alone()
    mine, outputs = ranks.mine(micro_batches), []
    sums = np.zeros(3)  # loss, auxiliary loss, images right
    for number, part in zip(mine, split(batch, len(mine)), strict=True):
        number += first
        part = prepare(part)
        if mix is not None:
            part = mix(part, (*noise_key, number))
        update.forward(part, (*noise_key, number), share=share / micro_batches)
        (loss, auxiliary, *_), output = update.terms, update.output
        update.backward()
        outputs.append(output)
        right = (output.logits.detach().argmax(1) == part.labels).sum()
        # One tensor, so that a GPU is synchronized once.
        sums += torch.stack([loss.detach(), auxiliary.detach(), right.float()]).tolist()
    loss, auxiliary, correct = ranks.total(sums).tolist()
    images = len(batch) * ranks.world
    return BatchResult(loss / micro_batches, auxiliary / micro_batches, correct / images, outputs)


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """Split a batch from the loader into parts of equal size."""
    size = len(batch) // parts
    for start in range(0, parts * size, size):
        part = slice(start, start + size)
        yield dataclasses.replace(
            batch,
            positions=batch.positions[part],
            views=None if batch.views is None else batch.views[part],
            images=None if batch.images is None else batch.images[part],
            labels=batch.labels[part],
        )


# --- an update on fixed inputs, for measurements ---


class TrainingStep(OptimizerUpdate):
    """An update of one fixed micro-batch. `run` runs all its phases."""

    def __init__(
        self, model: nn.Module, runtime: Runtime, optimizer: Optimizer | None, *, inputs: tuple = (), **parts: Any
    ) -> None:
        """
        Args:
            inputs: inputs of every forward phase. parts: see `OptimizerUpdate`.
        """
        super().__init__(model, runtime, optimizer, **parts)
        self.inputs = inputs

    def forward(self) -> None:
        super().forward(*self.inputs)

    def run(self) -> None:
        self.forward()
        self.backward()
        self.step()
        self.clear()

    @torch.no_grad()
    def infer(self) -> None:
        """Run only the forward pass, as evaluation does."""
        with self.runtime.autocast():
            self._output(*self.inputs)


def random_batch(images: int, size: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (B, 3, S, S) standard normal images and (B,) labels, with a fixed seed."""
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, size, size, generator=draws)
    return pixels.to(device), torch.randint(classes, (images,), generator=draws).to(device)


def training_step(
    model: MultitaskViT, config: Config, runtime: Runtime, *, batch: int, task: str | None = None
) -> TrainingStep:
    """Return an update of our model as the trainer takes it, on random images. With ALaST it is the costliest one.

    Args:
        model: already on the device (`runtime.place`). batch: number of images in the micro-batch.
        task: the first one by default.
    """
    task = task or model.tasks[0]
    images, labels = random_batch(batch, model.image_size, model.heads[task].out_features, runtime.device)
    optimizer = make_optimizer(model, config.train)
    settle(model, config, optimizer)
    return TrainingStep(
        model,
        runtime,
        optimizer,
        inputs=(Batch(task, np.arange(batch), images, labels), (0, 0, 0)),
        **_multitask_parts(model, config.train, optimizer),
    )
