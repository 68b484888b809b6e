"""Trace a training step in one piece: the slow and simple reference for `predict`."""

import contextlib
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from moe_bsr.config import Config
from moe_bsr.cost import kernel_scratch
from moe_bsr.cost.expert_rows import unequal_rows
from moe_bsr.cost.operators import empty
from moe_bsr.cost.sections import fake_parameters
from moe_bsr.cost.trace import Tracer, fake_tensors
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.ops.experts import assume_rows
from moe_bsr.runtime.device import Runtime
from moe_bsr.training.optim import MovingAverage
from moe_bsr.training.update import training_step


@dataclass(slots=True)
class Whole:
    """Bytes and FLOPs of one step of one task."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    kept: int
    kept_by_block: dict[str, dict[str, int]]
    peaks: dict[str, int]
    transients: dict[str, int]
    forward_flops: int
    step_flops: int


def trace_whole(
    model: MultitaskViT, config: Config, *, batch: int, precision: str, task: str, share: float, device: str = "cpu"
) -> Whole:
    """Run the measured step on fake tensors twice: first for what the graph keeps, then for everything else."""
    place = torch.device(device)
    runtime = Runtime(place, precision, torch.get_num_threads(), "")
    with (
        fake_tensors(),
        fake_parameters(dict(model.named_modules()), place, lambda tensor: tensor.dtype) as parameters,
        assume_rows(unequal_rows(share)),
        marked_sections(model) as sections,
    ):
        if precision == "bf16":
            model.cast_frozen_(torch.bfloat16)
        held = [*parameters.values(), *model.buffers()]
        step = training_step(model, config, runtime, batch=batch, task=task)
        average = None if config.train.ema_decay is None else MovingAverage(model, config.train.ema_decay)
        tracer = Tracer(place, kernel_scratch.on(place, torch.get_num_threads()), parameters.values())
        sections.append(tracer)
        commit, step._commit = step._commit, None  # it would read the output, which is deleted below
        with tracer:
            step.forward()
            step.output = None
            kept: dict[str, Counter[str]] = defaultdict(Counter)
            for allocation in tracer.alive:
                kept[allocation.section][allocation.maker] += allocation.bytes
            step.backward()
            step.step()  # creates the optimizer's state
            step.clear()
        step._commit = commit
        sections.pop()

        tracer = Tracer(place, kernel_scratch.on(place, torch.get_num_threads()), parameters.values())
        sections.append(tracer)
        with tracer:
            for phase in ("forward", "backward"):
                tracer.phase = phase
                getattr(step, phase)()
            gradients = [tracer.allocation(p.grad) for p in step.trained]
            tracer.phase = "optimizer"
            step.step()
            if average is not None:
                average.update(model)
            step.clear()
        state = [v for values in step.optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
        phases = ("forward", "backward", "optimizer")
        return Whole(
            parameters=bytes_of(held),
            gradients=sum(a.bytes for a in gradients),
            optimizer=bytes_of(state),
            average=0 if average is None else bytes_of(average.average.values()),
            kept=sum(sum(makers.values()) for makers in kept.values()),
            kept_by_block={section: dict(makers) for section, makers in kept.items()},
            peaks={phase: tracer.trace.peak(phase) for phase in phases},
            transients={phase: tracer.trace.peak(phase, gradients) for phase in phases},
            forward_flops=tracer.trace.phase_flops("forward"),
            step_flops=tracer.trace.phase_flops("forward") + tracer.trace.phase_flops("backward"),
        )


def bytes_of(tensors) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@contextlib.contextmanager
def marked_sections(model: nn.Module):
    """Set the section of each allocation in a forward pass. Yields a list, whose last tracer is the active one."""
    tracers: list[Tracer] = []
    features, block = model.forward_features, model.run_block

    def mark(section: str) -> None:
        if tracers:
            tracers[-1].section = section

    def marked_features(*arguments):
        mark("embedding")
        return features(*arguments)

    def marked_block(index: int, *arguments):
        mark(f"block {index}")
        return block(index, *arguments)

    model.forward_features, model.run_block = marked_features, marked_block
    norm = model.vit.norm.register_forward_pre_hook(lambda *_: mark("head"))
    try:
        yield tracers
    finally:
        del model.forward_features, model.run_block
        norm.remove()


def fake_images(batch: int, size: int, device: torch.device) -> torch.Tensor:
    return empty((batch, 3, size, size), torch.float32, device)
