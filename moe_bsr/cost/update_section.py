"""Trace the optimizer's part of a training step: the size of its state and the temporary memory of an update."""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import nn

from moe_bsr.cost.model_sections import Setting
from moe_bsr.cost.operators import empty
from moe_bsr.cost.trace import Tracer
from moe_bsr.training import adamw8
from moe_bsr.training.optim import MovingAverage, clip_groups, make_optimizer
from moe_bsr.training.step_in_backward import StepInBackward
from moe_bsr.training.update import multitask_update

CHUNKS = 3  # traced per parameter under adamw8. There may be a thousand, and later ones allocate what these do.


@dataclass(slots=True)
class Update:
    """Memory of an optimizer update, in bytes.

    Attributes:
        state, average: the optimizer's state and the parameters' moving average.
        rise: peak during an update relative to its start.
    """

    state: int
    average: int
    rise: int


def trace_update(setting: Setting, stepped: Collection[str], with_gradient: Collection[str]) -> Update:
    """Trace gradient clipping, the optimizer and the moving average.

    Args:
        stepped: names of the parameters that had an update before. with_gradient: of those that have a gradient now.
    """
    model, settings, starts = setting.model, setting.config.train, adamw8.starts
    few = mock.patch.object(adamw8, "starts", lambda blocks: starts(blocks)[:CHUNKS])
    with few, setting.tracing(dict(model.named_modules())) as traced:
        tracer, parameters, changes = traced.tracer, traced.parameters, traced.tracer.trace.changes
        average = None if settings.ema_decay is None else MovingAverage(model, settings.ema_decay)
        held = sum(a.size for a in tracer.alive)
        if not setting.differentiates:  # the perturbation of one parameter at a time
            return Update(0, held, max(p.nbytes for p in parameters.values() if p.requires_grad))
        optimizer = make_optimizer(model, settings)
        update = multitask_update(model, replace(settings, step_in_backward=False), setting.runtime, optimizer, average)
        for phase, names in (("first", stepped), ("optimizer", with_gradient)):
            tracer.phase = "outside"
            if phase == "optimizer" and settings.step_in_backward:  # only the gradients' norms are left by then
                update.stepper = StepInBackward(optimizer)
                group_of = (settings.grad_clip_norm and clip_groups(model, settings)) or id
                groups = {group_of(parameters[name]) for name in names}
                update.stepper.norms = [empty((), torch.float32, setting.runtime.device) for _ in groups]
                names = ()
            for name in names:
                parameters[name].grad = torch.empty_like(parameters[name])
            update.trained = [p for p in parameters.values() if p.grad is not None]
            tracer.phase = phase
            if phase == "optimizer":
                start = len(changes)
            with _once_for_alike(tracer):
                update.step()
    state = sum(a.size if made else -a.size for _, made, a in changes[:start] if a.phase == "first")
    live = rise = 0
    for _, made, allocation in changes[start:]:
        if allocation.phase == "optimizer":
            live += allocation.bytes if made else -allocation.bytes
            rise = max(rise, live)
    return Update(state, held, rise)


@contextlib.contextmanager
def _once_for_alike(tracer: Tracer) -> Iterator[None]:
    """Context in which `AdamW8`, which updates parameters in turn, is traced once per shape and then replayed."""
    update, changes = adamw8.AdamW8._update, tracer.trace.changes
    first: dict[tuple, tuple[nn.Parameter, int, int]] = {}

    def noted(optimizer: adamw8.AdamW8, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        key = parameter.shape, parameter.dtype, parameter in optimizer.state
        if key in first:
            other, start, end = first[key]
            optimizer.state[parameter] = optimizer.state[other]
            changes.extend(changes[start:end])
            return
        start = len(changes)
        update(optimizer, parameter, group)
        first[key] = parameter, start, len(changes)

    with mock.patch.object(adamw8.AdamW8, "_update", noted):
        yield
