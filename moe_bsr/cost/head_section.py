"""Trace the section behind the last block, by running the trainer's own update on fake tensors."""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from moe_bsr.cost.ladder_section import empty_rungs
from moe_bsr.cost.model_sections import NOISE_KEY, Modules, Setting, Traced, bring_tokens, starting_at
from moe_bsr.cost.operators import empty
from moe_bsr.cost.sections import Border, Section, Stream, summarize
from moe_bsr.data.loader import Batch
from moe_bsr.model.block import Record
from moe_bsr.model.moe import Routing
from moe_bsr.model.multitask import MultitaskViT, Output
from moe_bsr.model.tokens import Tokens
from moe_bsr.training.update import OptimizerUpdate, multitask_update


def trace_head(
    setting: Setting,
    modules: Modules,
    task: str,
    routing: list[tuple[bool, ...]],
    streams: list[Stream],
    with_gradient: Collection[str],
) -> Section:
    """Trace side network, final norm, pooling, the task's head and the losses, and their backward pass.

    Args:
        routing: for each block that routes, whether its importance and load require a gradient.
        streams: the tokens that leave the embedding and each block.
        with_gradient: names of the parameters that have a gradient already.
    """
    with setting.tracing(modules) as traced:
        tracer = traced.tracer
        border = Border(tracer)
        update, inputs, held = _head_update(setting, border, traced, task, streams, routing)
        update.forward(inputs, NOISE_KEY)
        update.output = None
        kept = Counter()
        reported = [tracer.allocation(tensor) for tensor in held if tensor is not None]
        for allocation in set(tracer.alive).difference(border.imported, reported):
            kept[allocation.maker] += allocation.bytes
        # Imported allocations have the first slots, in the order of the calls of `bring`.
        kept_slots = tuple(i for i, a in enumerate(border.imported) if a in tracer.alive)
        update.clear()
    with setting.tracing(modules, with_gradient) as traced:
        tracer = traced.tracer
        border = Border(tracer)
        update, batch, held = _head_update(setting, border, traced, task, streams, routing)
        inputs = list(border.imported)
        tracer.phase = "forward"
        update.forward(batch, NOISE_KEY)
        tracer.phase = "backward"
        if setting.differentiates:
            update.backward()
        gradients, trained = traced.gradients()
        tracer.phase = "clear"
        update.clear()
        passed = len(border.left) - sum(len(flags) for flags in routing)
        left = [None if t is None else tracer.allocation(t) for t in border.left]
        tokens, balance = ([a for a in part if a is not None] for part in (left[:passed], left[passed:]))
        section = summarize(
            tracer,
            border,
            gradients,
            [],
            [*tokens, *balance],
            [],
            inputs=inputs,
            trained=trained,
            gradient_out=tokens,
            routing_in=balance,
        )
        del held
    section.kept, section.kept_slots = kept, kept_slots
    return section


def _head_update(
    setting: Setting,
    border: Border,
    traced: Traced,
    task: str,
    streams: list[Stream],
    routing: list[tuple[bool, ...]],
) -> tuple[OptimizerUpdate, Batch, list[Tensor | None]]:
    """Return the trainer's update for a model that begins behind the last block, its batch, and the rungs' scores.

    The model's output goes on holding these scores (None: a rung without).
    """
    tokens = bring_tokens(border, streams[-1])
    tokens.rungs = empty_rungs(setting.model, streams, setting.runtime.device)
    experts = setting.config.moe.num_experts
    records = {
        index: Record(routing=Routing(None, None, None, *(border.bring((experts,), torch.float32, f) for f in flags)))
        for index, flags in zip(sorted(setting.config.plan.moe_blocks), routing, strict=True)
    }
    labels = empty((setting.batch,), torch.int64, setting.runtime.device)
    update = multitask_update(
        _BehindBlocks(setting.model, [(tokens, records)]),
        # Learned task weights are a few bytes; the section's own stepper clips.
        replace(
            setting.config.train,
            task_weighting="fixed",
            optimizer="sgd",
            step_in_backward=False,
            grad_clip_per="model",
        ),
        setting.runtime,
        torch.optim.SGD(traced.parameters.values(), lr=1.0),
    )
    update.stepper = traced.stepper
    return update, Batch(task, np.arange(setting.batch), None, labels), [rung.scores for rung in tokens.rungs]


class _BehindBlocks(nn.Module):
    """The part of a model behind its blocks.

    Args:
        start: the blocks' tokens and records. The call empties the list, so that nothing else holds them.
    """

    def __init__(self, model: MultitaskViT, start: list[tuple[Tokens, dict[int, Record]]]) -> None:
        super().__init__()
        self._whole, self._start = [model], start

    def forward(self, images: None, task: str, noise_key: tuple[int, ...]) -> Output:
        model = self._whole[0]
        with starting_at(model, len(model.plan)):
            return model._forward_path(self._start, task, noise_key)

    def commit(self, output: Output, task: str) -> None:
        self._whole[0].commit(output, task)
