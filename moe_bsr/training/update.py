"""The one optimizer update: micro-batches forward and backward, then clipping, the optimizer, the moving average.

The trainer runs it, and so does whoever traces, measures or times a training step: there is no second copy.
It runs phase by phase, so that each phase can be looked at alone:

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
from collections.abc import Callable, Iterator
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
from moe_bsr.training.optim import MovingAverage, clip_gradients, make_optimizer
from moe_bsr.training.step_in_backward import StepInBackward


class OptimizerUpdate:
    """One optimizer update of any model, in phases.

    Attributes:
        output: what the model returned in the last forward phase.
        terms: the terms of its loss, scalars. loss: their sum; both are None after the backward phase.
        trained: parameters with a gradient after the last backward phase; `step` clips these.
        stepper: takes the optimizer's step in the backward phase, if that is asked for.
        estimator: estimates gradients without a backward pass, if that is asked for.
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
        clip_each: bool = False,
        average: MovingAverage | None = None,
        in_backward: bool = False,
        estimator: MeZO | None = None,
    ) -> None:
        """
        Args:
            optimizer: None for whoever runs the forward and backward phases alone.
            output: the model's forward pass of the inputs given to `forward`; called under autocast.
            loss: of that output and the same inputs, called outside autocast: a scalar, or several to be added.
            commit: what else is done with the output and the inputs, once, after the backward pass.
            clip_norm: largest norm of all gradients together. inf only measures the norm, None not even that.
            clip_each: clip each parameter's gradient to that norm instead; always so with `in_backward`.
            average: of the weights, updated after each step.
            in_backward: whether the backward phase takes the optimizer's step too.
            estimator: in place of a backward pass; the last of the inputs is then the noise key.
        """
        self.model, self.runtime, self.optimizer = model.train(), runtime, optimizer
        self._output, self._loss, self._commit = output, loss, commit
        self._clip_norm, self._clip_each, self._average = clip_norm, clip_each, average
        self.stepper = StepInBackward(optimizer, clip_norm) if in_backward and optimizer is not None else None
        self.estimator = estimator
        self._inputs: tuple = ()
        self._share = 1.0
        self.output: Any = None
        self.terms: tuple[Tensor, ...] | None = None
        self.loss: Tensor | None = None
        self.trained: list[nn.Parameter] = []

    def forward(self, *inputs: Any, share: float = 1.0) -> None:
        """One micro-batch up to its loss, which counts `share` in the loss of the update."""
        run = functools.partial(self._pass, *inputs)
        self.output, self.terms = run() if self.estimator is None else self.estimator.look(run, inputs, share)
        self.loss = functools.reduce(operator.add, self.terms)
        self._inputs, self._share = inputs, share

    def _pass(self, *inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """What the model returns, and the terms of its loss."""
        with self.runtime.autocast():
            output = self._output(*inputs)
        terms = self._loss(output, *inputs)
        return output, terms if isinstance(terms, tuple) else (terms,)

    def backward(self) -> None:
        """Add this micro-batch's gradient to those before it."""
        if self.estimator is None:
            with contextlib.nullcontext() if self.stepper is None else self.stepper.active():
                (self._share * self.loss).backward()
        self.loss = self.terms = None
        if self._commit is not None:
            self._commit(self.output, *self._inputs)
        self._inputs = ()
        groups = self.optimizer.param_groups if self.optimizer else [{"params": self.model.parameters()}]
        self.trained = [p for group in groups for p in group["params"] if p.grad is not None]

    def step(self) -> float | None:
        """Clip, step, forget the gradients, move the average.

        Returns:
            The gradient's norm before clipping; None if `clip_norm` is.
        Raises:
            FloatingPointError: that norm is not finite; nothing has been changed then, unless in the backward phase.
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
        """Of the gradient, which is clipped."""
        if self.estimator is not None:
            return self.estimator.clip(self._clip_norm)
        if self.stepper is not None:
            return self.stepper.norm()
        return clip_gradients(self.trained, self._clip_norm, self._clip_each)

    def clear(self) -> None:
        """Let go of the last micro-batch's output."""
        self.output = self.loss = self.terms = None
        self._inputs = ()


# --- of our model, as it is trained ---


def multitask_update(
    model: MultitaskViT,
    config: TrainConfig,
    runtime: Runtime,
    optimizer: Optimizer,
    average: MovingAverage | None = None,
    class_weights: dict[str, Tensor] | None = None,
    commits: bool = True,
) -> OptimizerUpdate:
    """The update of our model; the inputs of its forward phase are a prepared `Batch` and a noise key.

    Args:
        class_weights: (classes of the task,) by task, on the device; none where all count 1.
        commits: whether running statistics take in each micro-batch; if not, that is left to the caller.
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
        # Over the number of images: torch's mean divides by their weights, and would depend on the micro-batches.
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
        # Kendall et al. 2018, of classification: L / variance + log of the standard deviation. The first two terms
        # are what is told of a batch, so the weighing comes as one of its own.
        log_variance = model.log_variances[batch.task]
        return entropy, output.auxiliary_loss, entropy * torch.expm1(-log_variance) + log_variance / 2

    return {
        "output": output,
        "loss": loss,
        "commit": lambda output, batch, noise_key: model.commit(output, batch.task),
        "in_backward": config.step_in_backward,
        "estimator": estimator_of(model, config, optimizer),
        "clip_norm": math.inf if config.grad_clip_norm is None else config.grad_clip_norm,
        "clip_each": config.grad_clip_per == "parameter",
    }


def task_weights(tasks: list[str], config: TrainConfig) -> dict[str, float]:
    """Each task's `train.task_weights` (1 where there is none) over their mean."""
    weights = [config.task_weights.get(task, 1.0) for task in tasks]
    mean = sum(weights) / len(tasks)
    return {task: weight / mean for task, weight in zip(tasks, weights, strict=True)}


class BatchResult(NamedTuple):
    """What is known of a batch after its backward phases: means over its micro-batches, and what the model returned.

    Attributes:
        accuracy: share of images whose largest logit was the label's, in [0, 1].
        outputs: of the micro-batches of this process.
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
    """Forward and backward of a batch in micro-batches of equal size; of an update from `multitask_update`.

    Args:
        batch: this process's share of it. micro_batches: of the whole.
        share: of the batch in the loss of the update.
        noise_key: of the update; the number of the micro-batch is added to it, which is `first` for the first.
        prepare: makes a micro-batch as the loader has it into what the model takes, on its device.
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
        # In one tensor: a GPU is waited for once.
        sums += torch.stack([loss.detach(), auxiliary.detach(), right.float()]).tolist()
    loss, auxiliary, correct = ranks.total(sums).tolist()
    images = len(batch) * ranks.world
    return BatchResult(loss / micro_batches, auxiliary / micro_batches, correct / images, outputs)


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch from the loader in parts of equal size."""
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


# --- on fixed inputs, for whoever measures ---


class TrainingStep(OptimizerUpdate):
    """An update of one micro-batch that is the same every time; `run` does all its phases."""

    def __init__(
        self, model: nn.Module, runtime: Runtime, optimizer: Optimizer | None, *, inputs: tuple = (), **parts: Any
    ) -> None:
        """
        Args:
            inputs: of every forward phase. parts: see `OptimizerUpdate`.
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
        """The forward pass alone, as evaluation runs it."""
        with self.runtime.autocast():
            self._output(*self.inputs)


def random_batch(images: int, size: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) standard normal images and (B,) labels, the same ones every time."""
    draws = torch.Generator().manual_seed(0)
    return (
        torch.randn(images, 3, size, size, generator=draws).to(device),
        torch.randint(classes, (images,), generator=draws).to(device),
    )


def training_step(
    model: MultitaskViT, config: Config, runtime: Runtime, *, batch: int, task: str | None = None
) -> TrainingStep:
    """A step of one of our models the way the trainer takes it, on random images; the costliest, where steps differ.

    Args:
        model: on the device already (`runtime.place`). batch: images of the micro-batch.
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
