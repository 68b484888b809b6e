"""Predict the memory and FLOPs of a training step by tracing the code that the trainer runs.

`predict` traces each kind of section of a model once, with fake tensors, and puts a step together from these traces.
The network never computes anything, so a model on the meta device is enough.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from moe_bsr.config import Config, replace
from moe_bsr.cost.step import Step, as_trained, device_of
from moe_bsr.cost.timeline import Placed, Timeline
from moe_bsr.cost.trace import WEIGHT_COPY
from moe_bsr.evaluation.evaluate import BATCH
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.training.drawn_blocks import costliest_update


@dataclass(slots=True)
class Cost:
    """Bytes and FLOPs of the training step of one micro-batch and the update after it.

    Attributes:
        parameters: weights and buffers in the dtypes of training (frozen matrices in the compute dtype).
        copies: copies of trained weights in the compute dtype, held from the forward to the backward pass; part of
            `kept`.
        gradients: at the end of the backward pass. optimizer: state from the first update on.
        average: the copy of the trained parameters that `train.ema_decay` keeps.
        kept: saved for the backward pass. kept_by_block: the same by section and by the operator that allocated it.
        written: saved on disk for the backward pass instead of in memory; not part of `kept`.
        transients: peak in the forward pass, the backward pass and the optimizer, relative to the start of the step;
            with `kept`, without gradients.
        peak: of everything except the images and the features that `data.feature_cache_mb` caches.
        forward_flops, step_flops: of the micro-batch. A multiply-add counts as two.
        flops_by_block: `step_flops` by section.
    """

    parameters: int
    copies: int
    gradients: int
    optimizer: int
    average: int
    kept: int
    kept_by_block: dict[str, dict[str, int]]
    transients: dict[str, int]
    peak: int
    forward_flops: int
    step_flops: int
    flops_by_block: dict[str, int]
    written: int = 0

    def summary(self, batch: int) -> str:
        """Return one line for the log of a run with micro-batches of `batch` images."""
        disk = f", {self.written / 2**20:.0f} MB more on disk" if self.written else ""
        return (
            f"predicted: {self.peak / 2**20:.0f} MB of tensors at the peak of a step ({self.kept / 2**20:.0f} MB kept "
            f"for backward{disk}), {self.step_flops / batch / 1e9:.2f} GFLOPs an image to train"
        )


def predict(
    model: MultitaskViT,
    config: Config,
    *,
    batch: int,
    precision: str,
    task: str | None = None,
    all_tasks: bool = False,
    shares: dict[int, float] | None = None,
    scratch: bool = True,
) -> Cost:
    """Predict the cost of a training step of one task with micro-batches of `batch` images.

    Args:
        model: on any device, including "meta" (`build_on_meta`). precision: "fp32" or "bf16".
        task: by default the one with the most classes.
        all_tasks: assume that every task has been trained before. This adds the optimizer state of all heads and
            routers, with joint sampling also their gradients, and to the peak what an update's earlier micro-batches
            left in memory.
        shares: by index of a block with experts, the measured size of the largest expert's group relative to an equal
            split. It depends on the data, and is estimated for blocks that are missing.
        scratch: whether kernels' scratch memory counts. Without it the numbers are the same on every CPU.
    """
    with as_trained(model, device_of(config), precision):
        return _predict(Step(model, config, batch, precision, shares or {}, scratch), config, task, all_tasks)


def _predict(step: Step, config: Config, task: str | None, all_tasks: bool) -> Cost:
    model = step.model
    task = task or max(model.trained_tasks, key=lambda name: model.heads[name].out_features)
    tasks = model.trained_tasks if all_tasks and config.sampler.kind == "joint" else [task]
    micro_batches = [name for name in tasks for _ in range(config.train.grad_accumulation_steps if all_tasks else 1)]
    timeline, first, passes = Timeline(), None, 1 if step.setting.differentiates else 2
    done: list[list[Placed]] = []
    with costliest_update(model, config) as resting:
        for name in micro_batches:
            copy = step.copy(name)
            timeline.add(copy)
            for _ in range(passes):
                places = step.places(name)
                kept = timeline.forward(places)
            timeline.add(-copy)
            timeline.backward(places)
            done.append(places)
            if first is None:
                first = kept, dict(timeline.peaks_without), places
    kept, transients, places = first
    gradients = sum(place.section.gradients for places in done for place in places)
    everything = [n for n, p in model.named_parameters() if p.requires_grad] if all_tasks else step.trained | resting
    update = step.update(everything)
    timeline.peaks["optimizer"] = timeline.live + update.rise
    transients["optimizer"] = timeline.live_without + update.rise
    parameters = sum(t.numel() * step.setting.dtype(t).itemsize for t in (*model.parameters(), *model.buffers()))
    peak = max(timeline.peaks.values())
    flops = {p.name: passes * p.section.forward_flops + p.section.backward_flops for p in places}
    return Cost(
        parameters=parameters,
        copies=sum(makers.get(WEIGHT_COPY, 0) for makers in kept.values()),
        gradients=gradients,
        optimizer=update.state,
        average=update.average,
        kept=sum(sum(makers.values()) for makers in kept.values()),
        kept_by_block=kept,
        transients=transients,
        peak=parameters + update.state + update.average + peak,
        forward_flops=sum(place.section.forward_flops for place in places),
        step_flops=sum(flops.values()),
        flops_by_block=flops,
        written=sum(place.section.written for place in places),
    )


def evaluation_peak(model: MultitaskViT, config: Config, precision: str) -> int:
    """Predict the peak of an evaluation, in bytes without weights and images: a forward pass of `BATCH` images.

    Args:
        model, precision: as in `predict`.
    """
    config = replace(config, train__alast__blocks=None)
    with _without_training(model):
        return predict(model, config, batch=BATCH, precision=precision).transients["forward"]


@contextlib.contextmanager
def _without_training(model: MultitaskViT) -> Iterator[None]:
    """Context in which no block is on the gradient path, so that nothing is saved for a backward pass."""
    trained = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("heads.")]
    before = model.embedding_trains, model.path_start
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        model.embedding_trains, model.path_start = False, len(model.plan)
        yield
    finally:
        model.embedding_trains, model.path_start = before
        for parameter in trained:
            parameter.requires_grad_(True)
