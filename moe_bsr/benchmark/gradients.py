"""Compare storages on one batch of real images: bytes kept, and how close the gradients are to the exact ones.

The head is first fitted to the batch on frozen features, because gradients behind a random head say little. All
storages then see the same network, images and decisions. Every difference is therefore due to the storage.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_bsr.benchmark.measure import kept_for_backward
from moe_bsr.config import Config
from moe_bsr.config.registry import Choice
from moe_bsr.data.loader import Batch
from moe_bsr.data.sampler import MultitaskSampler
from moe_bsr.model.multitask import MultitaskViT, build
from moe_bsr.runs import folder as run
from moe_bsr.runtime.device import Runtime
from moe_bsr.training.inputs import Inputs
from moe_bsr.training.update import TrainingStep, training_step

HEAD_STEPS, HEAD_RATE = 20, 0.01


@dataclass(frozen=True)
class Row:
    """One storage compared with the first one, usually `exact`.

    Attributes:
        kept: measured bytes per image that are kept for the backward pass, copies of weights included.
        cosine: similarity to the exact gradient, all parameters concatenated.
        error, norm: lengths of the difference and of the gradient, relative to that of the exact gradient.
        seconds: median time of a forward and backward pass; NaN if not timed.
    """

    storage: str
    kept: float
    cosine: float
    error: float
    norm: float
    seconds: float


def prepare(config: Config, runtime: Runtime) -> tuple[Batch, MultitaskViT]:
    """Return the first batch of the first task, and the model to train with it, both on the device."""
    name, file = next(iter(config.task_files().items()))
    data = run.open_task(config, file)
    model = runtime.place(build(config, {name: len(data.class_names)}))
    sampler = MultitaskSampler({name: len(data.train)}, config.train.batch_size, 1, config.sampler, config.seed)
    inputs = Inputs({name: data}, run.make_transforms(config, model), runtime)
    batches = inputs.batches(sampler.batches())
    return inputs.prepare(next(batches)), model


def compare(
    config: Config, runtime: Runtime, model: MultitaskViT, batch: Batch, storages: Sequence[Choice], rounds: int
) -> list[Row]:
    """Return a row for each storage, compared with the first one.

    Args:
        model: on the device, with any storage. batch: of one task, prepared.
        rounds: how many times each storage is timed, in turn with the others. 0: no timing.
    """
    _fit_head(model, runtime, batch)
    if not config.train.differentiates:  # the comparison needs gradients even if the run does not
        config = replace(config, train=replace(config.train, optimizer="sgd"))
    step = training_step(model, config, runtime, batch=len(batch.labels), task=batch.task)
    step.inputs = (batch, (config.seed, 0, 0))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def choose(storage: Choice) -> None:
        """Give the model this storage, and restore its buffers."""
        model.contexts = [replace(c, plan=replace(c.plan, storage=storage)) for c in model.contexts]
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])

    kept, found = [], []
    for storage in storages:
        choose(storage)
        kept.append(sum(allocation.bytes for allocation in kept_for_backward(step)[0]) / len(batch.labels))
        choose(storage)
        found.append(_gradients(step))
    times: list[list[float]] = [[] for _ in storages]
    for turn in range(rounds):
        order = range(len(storages))
        for place in order if turn % 2 == 0 else reversed(order):
            choose(storages[place])
            times[place].append(_time(step))
    exact, size = found[0], float(found[0].norm())
    return [
        Row(
            str(storage),
            kept_bytes,
            float(F.cosine_similarity(gradient, exact, dim=0)),
            float((gradient - exact).norm()) / size,
            float(gradient.norm()) / size,
            statistics.median(seconds) if seconds else math.nan,
        )
        for storage, kept_bytes, gradient, seconds in zip(storages, kept, found, times, strict=True)
    ]


def _fit_head(model: MultitaskViT, runtime: Runtime, batch: Batch) -> None:
    """Fit the head with a few steps of Adam on the features of the batch."""
    with torch.no_grad(), runtime.autocast():
        tokens, _ = model.forward_features(batch.images, batch.task)
        features = model.features_from(tokens, batch.task)
    optimizer = torch.optim.Adam(model.heads[batch.task].parameters(), lr=HEAD_RATE)
    for _ in range(HEAD_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model.classify(features, batch.task), batch.labels).backward()
        optimizer.step()
    optimizer.zero_grad()


def _gradients(step: TrainingStep) -> Tensor:
    """Return the gradients of all trained parameters as one float64 vector."""
    step.forward()
    step.backward()
    found = torch.cat([p.grad.flatten().double() for p in step.trained])
    _forget(step)
    return found


def _time(step: TrainingStep) -> float:
    started = time.perf_counter()
    step.forward()
    step.backward()
    if step.runtime.device.type == "cuda":
        torch.cuda.synchronize(step.runtime.device)
    taken = time.perf_counter() - started
    _forget(step)
    return taken


def _forget(step: TrainingStep) -> None:
    step.clear()
    step.model.zero_grad(set_to_none=True)
