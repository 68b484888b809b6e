"""The sections of a model's training step: each is traced with the very code that the trainer runs."""

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_bsr.config import Config
from moe_bsr.cost.operators import empty
from moe_bsr.cost.sections import Border, Section, Stream, fake_parameters, summarize, tensors_of
from moe_bsr.cost.trace import Allocation, Tracer, fake_tensors
from moe_bsr.data.loader import Batch
from moe_bsr.model.block import Record
from moe_bsr.model.moe import Routing
from moe_bsr.model.multitask import MultitaskViT, Output
from moe_bsr.model.tokens import Tokens
from moe_bsr.ops.experts import assume_rows
from moe_bsr.runtime.device import Runtime
from moe_bsr.training.optim import MovingAverage, make_optimizer
from moe_bsr.training.update import OptimizerUpdate, multitask_update

NOISE_KEY = (0, 0, 0)


@dataclass(slots=True)
class Setting:
    """What all sections of one prediction have in common.

    Attributes:
        batch: images of a micro-batch. dtype: of a parameter or buffer while training.
        rows: of a block's experts: (assignments, experts, multiple) -> rows of each.
    """

    model: MultitaskViT
    config: Config
    runtime: Runtime
    batch: int
    dtype: Callable[[Tensor], torch.dtype]
    scratch: Callable[[str, tuple, Any], int]
    rows: Callable[[int], Callable[[int, int, int], list[int]]]

    @contextlib.contextmanager
    def tracing(
        self, modules: dict[str, nn.Module], with_gradient: Collection[str] = ()
    ) -> Iterator[tuple[Tracer, dict[str, nn.Parameter]]]:
        """A region in which the modules are fake and memory is followed.

        Args:
            with_gradient: names of parameters that have a gradient already.
        """
        with fake_tensors(), fake_parameters(modules, self.runtime.device, self.dtype) as parameters:
            for name in with_gradient:
                parameters[name].grad = empty(parameters[name].shape, parameters[name].dtype, self.runtime.device)
            with Tracer(self.runtime.device, self.scratch, parameters.values()) as tracer:
                yield tracer, parameters


Modules = dict[str, nn.Module]


def modules_of_sections(model: MultitaskViT) -> dict[str, Modules]:
    """All modules by section ("embedding", "block 0" ..., "head") and by name: in a block, of the block."""
    result: dict[str, Modules] = {"embedding": {}, "head": {}}
    for name, module in model.named_modules():
        root, _, rest = name.partition(".")
        place, _, inside = rest.partition(".")
        if root == "vit" and place == "blocks":
            index, _, inside = inside.partition(".")
            if index:
                result.setdefault(f"block {index}", {})[inside] = module
        elif name:
            later = place in _BEHIND_BLOCKS if root == "vit" else root in ("heads", "balance")
            result["head" if later else "embedding"][name] = module
    return result


def of_task(modules: Modules, tasks: Collection[str], task: str) -> Modules:
    """Without the heads of the other tasks."""
    others = {f"heads.{name}" for name in tasks if name != task}
    return {name: module for name, module in modules.items() if name not in others}


_BEHIND_BLOCKS = ("norm", "fc_norm", "head_drop", "head", "attn_pool")


def trace_embedding(setting: Setting, modules: Modules, with_gradient: Collection[str]) -> Section:
    """From images to the first block's tokens, and back if the embedding trains."""
    model, side = setting.model, setting.model.vit.patch_embed.img_size[0]
    with setting.tracing(modules, with_gradient) as (tracer, parameters):
        border = Border(tracer)
        images = empty((setting.batch, 3, side, side), torch.float32, setting.runtime.device)
        tracer.phase = "forward"
        with _starting_at(model, 0), setting.runtime.autocast():
            end = [model.forward_features(images)[0], None]
        return _finish_block(tracer, border, parameters, with_gradient, end, [])


def trace_block(
    setting: Setting, modules: Modules, index: int, task: str, stream: Stream, with_gradient: Collection[str]
) -> Section:
    """One block's forward pass, and its backward if the gradient path goes through it."""
    model, on_path = setting.model, index >= setting.model.path_start
    with (
        setting.tracing(modules, with_gradient) as (tracer, parameters),
        assume_rows(setting.rows(index)),
    ):
        border = Border(tracer)
        tokens = _bring_tokens(border, stream)
        inputs = [tracer.allocation(t) for t in (tokens.x, tokens.origin)]
        records: dict[int, Record] = {}
        tracer.phase = "forward"
        with torch.set_grad_enabled(on_path), setting.runtime.autocast():
            tokens = model.run_block(index, tokens, task, NOISE_KEY if on_path else None, records)
        end = [tokens, records.pop(index, None)]
        del tokens
        balances = model.balance.kind != "none"
        return _finish_block(tracer, border, parameters, with_gradient, end, inputs, balances)


def _bring_tokens(border: Border, stream: Stream) -> Tokens:
    x = border.bring(stream.shape, stream.dtype, stream.requires_grad)
    shape, strides = stream.origin
    origin = torch.empty_strided(shape, strides, dtype=torch.int64, device=x.device)
    border.imported.append(border.tracer.allocation(origin))
    return Tokens(x, origin, stream.fused)


def _finish_block(
    tracer: Tracer,
    border: Border,
    parameters: dict[str, nn.Parameter],
    with_gradient: Collection[str],
    end: list[Tokens | Record | None],
    inputs: list[Allocation],
    balances: bool = False,
) -> Section:
    """Let go of what a section returned, run its backward pass, and sum up.

    Args:
        end: the tokens and the record; emptied, so that nobody else holds them.
        balances: whether the loss looks at what a block's routers did.
    """
    record, tokens = end.pop(), end.pop()
    routing = None if record is None else record.routing
    x, origin = tokens.x, tokens.origin
    stream = Stream(tuple(x.shape), x.dtype, x.requires_grad, (tuple(origin.shape), origin.stride()), tokens.fused)
    outputs = [tracer.allocation(t) for t in (x, origin)]
    reported = [a for t in tensors_of(record) if (a := tracer.allocation(t)) is not None]
    balanced = [] if routing is None else [routing.importance, routing.load]
    about: dict[str, Any] = {
        "stream": stream,
        "routing": tuple(t.requires_grad for t in balanced),
        "reports": [tracer.allocation(t) for t in balanced],
    }
    wanted = [t for t in (x, *(balanced if balances else ())) if t.requires_grad]
    result = border.take(wanted) if x.requires_grad else None
    tracer.phase = "handover"
    del tokens, x, origin, record, routing, balanced, wanted
    kept, gradients = list(tracer.alive) if result is not None else [], []
    if result is not None:
        tracer.phase = "backward"
        torch.autograd.backward(result, torch.empty_like(result))
        tracer.phase = "after"
        del result
        gradients, about["trained"] = _gradients(tracer, parameters, with_gradient)
        about["gradient_in"], about["routing_in"] = border.arrived[:1], border.arrived[1:]
    left = [tracer.allocation(t) for t in border.left if t is not None]
    return summarize(
        tracer,
        border,
        gradients,
        reported,
        [*outputs, *left],
        kept,
        inputs=inputs,
        outputs=outputs,
        gradient_out=left,
        **about,
    )


def _gradients(
    tracer: Tracer, parameters: dict[str, nn.Parameter], with_gradient: Collection[str]
) -> tuple[list[Allocation], frozenset[str]]:
    """Gradients that are new, and the names of all parameters that have one."""
    trained = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return (
        [tracer.allocation(grad) for name, grad in trained.items() if name not in with_gradient],
        frozenset(trained),
    )


def trace_head(
    setting: Setting,
    modules: Modules,
    task: str,
    stream: Stream,
    routing: list[tuple[bool, ...]],
    with_gradient: Collection[str],
) -> Section:
    """Final norm, pooling, the task's head, the balance loss and the loss, and back to the last block.

    Args:
        routing: of each block that routes: whether its importance and load require a gradient.
    """
    with setting.tracing(modules) as (tracer, parameters):
        border = Border(tracer)
        update, inputs = _head_update(setting, border, parameters.values(), task, stream, routing)
        update.forward(inputs, NOISE_KEY)
        update.output = None
        kept = Counter()
        for allocation in set(tracer.alive).difference(border.imported):
            kept[allocation.maker] += allocation.bytes
        # Slots are numbered in the order in which they were brought.
        kept_slots = tuple(i for i, a in enumerate(border.imported) if a in tracer.alive)
        update.clear()
    with setting.tracing(modules, with_gradient) as (tracer, parameters):
        border = Border(tracer)
        update, batch = _head_update(setting, border, parameters.values(), task, stream, routing)
        inputs = list(border.imported)
        tracer.phase = "forward"
        update.forward(batch, NOISE_KEY)
        tracer.phase = "backward"
        update.backward()
        gradients, trained = _gradients(tracer, parameters, with_gradient)
        tracer.phase = "clear"
        update.clear()
        x, *balance = border.left
        left = [tracer.allocation(t) for t in (x, *balance) if t is not None]
        section = summarize(
            tracer,
            border,
            gradients,
            [],
            left,
            [],
            inputs=inputs,
            trained=trained,
            gradient_out=left[:1] if x is not None else [],
            routing_in=left[x is not None :],
        )
    section.kept, section.kept_slots = kept, kept_slots
    return section


def _head_update(
    setting: Setting,
    border: Border,
    parameters: Iterable[nn.Parameter],
    task: str,
    stream: Stream,
    routing: list[tuple[bool, ...]],
) -> tuple[OptimizerUpdate, Batch]:
    """The trainer's update of a model that begins behind the last block, and its inputs."""
    tokens = _bring_tokens(border, stream)
    if width := setting.model.extra_features:
        tokens.read = empty((setting.batch, width), stream.dtype, setting.runtime.device)
    experts = setting.config.moe.num_experts
    records = {
        index: Record(routing=Routing(None, None, None, *(border.bring((experts,), torch.float32, f) for f in flags)))
        for index, flags in zip(sorted(setting.config.plan.moe_blocks), routing, strict=True)
    }
    labels = empty((setting.batch,), torch.int64, setting.runtime.device)
    update = multitask_update(
        _BehindBlocks(setting.model, [(tokens, records)]),
        replace(setting.config.train, task_weighting="fixed"),  # learned weights are a few bytes
        setting.runtime,
        torch.optim.SGD(parameters, lr=1.0),
    )
    return update, Batch(task, np.arange(setting.batch), None, labels)


class _BehindBlocks(nn.Module):
    """What is left of a model when its blocks have run.

    Args:
        start: their tokens and records; emptied by the call, which alone may hold them.
    """

    def __init__(self, model: MultitaskViT, start: list[tuple[Tokens, dict[int, Record]]]) -> None:
        super().__init__()
        self._whole, self._start = [model], start

    def forward(self, images: None, task: str, noise_key: tuple[int, ...]) -> Output:
        model = self._whole[0]
        with _starting_at(model, len(model.plan)):
            return model._forward_path(self._start, task, noise_key)

    def commit(self, output: Output, task: str) -> None:
        self._whole[0].commit(output, task)


@contextlib.contextmanager
def _starting_at(model: MultitaskViT, block: int) -> Iterator[None]:
    """The gradient path starts at another block while the context lasts: none lies before it."""
    before, model.path_start = model.path_start, block
    try:
        yield
    finally:
        model.path_start = before


@dataclass(slots=True)
class Update:
    """Attributes:
    state, average: bytes of the optimizer's state and of the parameters' moving average.
    rise: most bytes alive in an update over those at its start.
    """

    state: int
    average: int
    rise: int


def trace_update(setting: Setting, stepped: Collection[str], with_gradient: Collection[str]) -> Update:
    """Clipping, the optimizer, the moving average.

    Args:
        stepped: names of parameters that had an update before. with_gradient: of those that have a gradient now.
    """
    model, settings = setting.model, setting.config.train
    with setting.tracing(dict(model.named_modules())) as (tracer, parameters):
        average = None if settings.ema_decay is None else MovingAverage(model, settings.ema_decay)
        held = sum(a.size for a in tracer.alive)
        optimizer = make_optimizer(model, settings)
        update = multitask_update(model, settings, setting.runtime, optimizer, average)
        state = 0
        for phase, names in (("first", stepped), ("optimizer", with_gradient)):
            tracer.phase = "outside"
            for name in names:
                parameters[name].grad = torch.empty_like(parameters[name])
            update.trained = [p for p in parameters.values() if p.grad is not None]
            tracer.phase = phase
            if phase == "optimizer":
                start = len(tracer.trace.changes)
            update.step()
            if phase == "first":
                state = sum(a.size for a in tracer.alive) - held
        changes = [c for c in tracer.trace.changes[start:] if c[2].phase == "optimizer"]
    live = rise = 0
    for _, made, allocation in changes:
        live += allocation.bytes if made else -allocation.bytes
        rise = max(rise, live)
    return Update(state, held, rise)
