"""Trace the embedding and the blocks of a training step, by running the trainer's own code on fake tensors."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_bsr.config import Config
from moe_bsr.cost.operators import empty
from moe_bsr.cost.sections import Border, Section, Stream, fake_parameters, summarize, tensors_of
from moe_bsr.cost.trace import Allocation, Tracer, fake_tensors
from moe_bsr.model.block import Record
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.tokens import Tokens
from moe_bsr.ops.experts import assume_rows
from moe_bsr.runtime.device import Runtime
from moe_bsr.training.optim import optimizer_of, state_of
from moe_bsr.training.step_in_backward import StepInBackward

NOISE_KEY = (0, 0, 0)


@dataclass(slots=True)
class Setting:
    """Settings that all sections of one prediction have in common.

    Attributes:
        batch: images of a micro-batch. dtype: function that returns a parameter's or buffer's dtype while training.
        scratch: (operator, arguments, result) -> scratch bytes of its kernel.
        rows: index of a block -> (assignments, experts, multiple) -> rows of each of its experts.
    """

    model: MultitaskViT
    config: Config
    runtime: Runtime
    batch: int
    dtype: Callable[[Tensor], torch.dtype]
    scratch: Callable[[str, tuple, Any], int]
    rows: Callable[[int], Callable[[int, int, int], list[int]]]

    @property
    def differentiates(self) -> bool:
        return self.config.train.differentiates

    @contextlib.contextmanager
    def tracing(self, modules: dict[str, nn.Module], with_gradient: Collection[str] = ()) -> Iterator["Traced"]:
        """Context in which the modules' parameters are fake and a tracer is active.

        Args:
            with_gradient: names of the parameters that have a gradient already.
        """
        fake = fake_parameters(modules, self.runtime.device, self.dtype)
        with torch.set_grad_enabled(self.differentiates), fake_tensors(), fake as parameters:
            for name in with_gradient:
                parameters[name].grad = empty(parameters[name].shape, parameters[name].dtype, self.runtime.device)
            stepper = self._stepper(parameters.values())  # made before the tracer, which then leaves out its state
            with Tracer(self.runtime.device, self.scratch, parameters.values()) as tracer:
                yield Traced(tracer, parameters, with_gradient, stepper)

    def _stepper(self, parameters: Iterable[nn.Parameter]) -> StepInBackward | None:
        """Return the object that takes optimizer steps in the backward pass, with the state of an earlier update."""
        trained, settings = [p for p in parameters if p.requires_grad], self.config.train
        if not settings.step_in_backward or not trained:
            return None
        optimizer = optimizer_of([{"params": trained}], settings)
        for p in trained:
            state = state_of(optimizer, p)
            optimizer.state[p] = {key: empty(t.shape, t.dtype, self.runtime.device) for key, t in state.items()}
        by_block = settings.grad_clip_per == "block"  # a section has the parameters of one group
        return StepInBackward(optimizer, settings.grad_clip_norm, (lambda parameter: 0) if by_block else id)


@dataclass(slots=True)
class Traced:
    """A section while it is traced.

    Attributes:
        parameters: by name. with_gradient: names of those that had a gradient before.
        stepper: updates the parameters in the backward pass; None without `train.step_in_backward`.
    """

    tracer: Tracer
    parameters: dict[str, nn.Parameter]
    with_gradient: Collection[str]
    stepper: StepInBackward | None

    def backward(self, result: Tensor) -> None:
        with contextlib.nullcontext() if self.stepper is None else self.stepper.active(result):
            torch.autograd.backward(result, torch.empty_like(result))

    def gradients(self) -> tuple[list[Allocation], frozenset[str]]:
        """Return the allocations of new gradients, and the names of all parameters that have or had a gradient."""
        if self.stepper is not None:
            moved = set(map(id, self.stepper.stepped))
            return [], frozenset(name for name, p in self.parameters.items() if id(p) in moved)
        trained = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        new = [self.tracer.allocation(grad) for name, grad in trained.items() if name not in self.with_gradient]
        return new, frozenset(trained)


Modules = dict[str, nn.Module]


def modules_of_sections(model: MultitaskViT) -> dict[str, Modules]:
    """Return all modules by section ("embedding", "block 0" ..., "head") and name (within a block: its own)."""
    result: dict[str, Modules] = {"embedding": {}, "head": {}}
    for name, module in model.named_modules():
        root, _, rest = name.partition(".")
        place, _, inside = rest.partition(".")
        if root == "vit" and place == "blocks":
            index, _, inside = inside.partition(".")
            if index:
                result.setdefault(f"block {index}", {})[inside] = module
        elif name:
            later = place in _BEHIND_BLOCKS if root == "vit" else root in ("ladder", "heads", "balance")
            result["head" if later else "embedding"][name] = module
    return result


def of_task(modules: Modules, tasks: Collection[str], task: str) -> Modules:
    """Return the modules without the heads of other tasks."""
    others = {f"heads.{name}" for name in tasks if name != task}
    return {name: module for name, module in modules.items() if name not in others}


_BEHIND_BLOCKS = ("norm", "fc_norm", "head_drop", "head", "attn_pool")


def trace_embedding(setting: Setting, modules: Modules, with_gradient: Collection[str]) -> Section:
    """Trace the embedding from images to tokens, and its backward pass if it trains."""
    model, side = setting.model, setting.model.image_size
    with setting.tracing(modules, with_gradient) as traced:
        tracer = traced.tracer
        border = Border(tracer)
        images = empty((setting.batch, 3, side, side), torch.float32, setting.runtime.device)
        tracer.phase = "forward"
        with starting_at(model, 0), setting.runtime.autocast():
            end = [model.forward_features(images)[0], None]
        return _finish_block(traced, border, end, [])


def trace_block(
    setting: Setting, modules: Modules, index: int, task: str, stream: Stream, with_gradient: Collection[str]
) -> Section:
    """Trace one block's forward pass, and its backward pass if it is on the gradient path."""
    model, on_path = setting.model, setting.differentiates and index >= setting.model.path_start
    with (
        setting.tracing(modules, with_gradient) as traced,
        assume_rows(setting.rows(index)),
    ):
        tracer = traced.tracer
        border = Border(tracer)
        tokens = bring_tokens(border, stream)
        inputs = [tracer.allocation(t) for t in crossing(tokens)]
        records: dict[int, Record] = {}
        tracer.phase = "forward"
        with torch.set_grad_enabled(on_path), setting.runtime.autocast():
            tokens = model.run_block(index, tokens, task, NOISE_KEY if on_path else None, records)
        end = [tokens, records.pop(index, None)]
        rungs = tokens.rungs  # held until this section is summed up, see `ladder_section`
        del tokens
        balances = model.balance.kind != "none"
        section = _finish_block(traced, border, end, inputs, balances)
        del rungs
        return section


def crossing(tokens: Tokens) -> list[Tensor]:
    """Return the tensors of tokens that blocks hand on, besides those for a side network."""
    return [t for t in (tokens.x, tokens.origin, tokens.place, tokens.class_tokens) if t is not None]


def bring_tokens(border: Border, stream: Stream) -> Tokens:
    """Make the tokens that enter a section. Their tensors are imported in the order of `crossing`."""
    x = border.bring(stream.shape, stream.dtype, stream.requires_grad)
    found = []
    for layout in (stream.origin, stream.place):
        found.append(None if layout is None else torch.empty_strided(*layout, dtype=torch.int64, device=x.device))
        border.imported += [] if layout is None else [border.tracer.allocation(found[-1])]
    class_tokens = None if stream.class_tokens is None else border.bring(*stream.class_tokens)
    return Tokens(x, found[0], stream.fused, found[1], class_tokens)


def _finish_block(
    traced: Traced,
    border: Border,
    end: list[Tokens | Record | None],
    inputs: list[Allocation],
    balances: bool = False,
) -> Section:
    """Release the outputs of a section, run its backward pass, and sum up.

    Args:
        end: the tokens and the record. The list is emptied, so that nothing else holds them.
        balances: whether the balance loss depends on this block's routing.
    """
    tracer, record, tokens = traced.tracer, end.pop(), end.pop()
    routing = None if record is None else record.routing
    x, read = tokens.x, tokens.class_tokens
    traces = [None if t is None else (tuple(t.shape), t.stride()) for t in (tokens.origin, tokens.place)]
    reads = None if read is None else (tuple(read.shape), read.dtype, read.requires_grad)
    stream = Stream(tuple(x.shape), x.dtype, x.requires_grad, traces[0], tokens.fused, traces[1], reads)
    outputs = [tracer.allocation(t) for t in crossing(tokens)]
    reported = [a for t in tensors_of(record) if (a := tracer.allocation(t)) is not None]
    balanced = [] if routing is None else [routing.importance, routing.load]
    about: dict[str, Any] = {
        "stream": stream,
        "routing": tuple(t.requires_grad for t in balanced),
        "reports": [tracer.allocation(t) for t in balanced],
    }
    passed = [t for t in (x, read) if t is not None and t.requires_grad]
    wanted = [*passed, *(t for t in (balanced if balances else ()) if t.requires_grad)]
    result, gradients_in = border.take(wanted) if x.requires_grad else None, len(passed)
    tracer.phase = "handover"
    del tokens, x, read, record, routing, balanced, passed, wanted
    kept, gradients = list(tracer.alive) if result is not None else [], []
    if result is not None:
        tracer.phase = "backward"
        traced.backward(result)
        tracer.phase = "after"
        del result
        gradients, about["trained"] = traced.gradients()
        about["gradient_in"], about["routing_in"] = border.arrived[:gradients_in], border.arrived[gradients_in:]
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


@contextlib.contextmanager
def starting_at(model: MultitaskViT, block: int) -> Iterator[None]:
    """Context in which the model's gradient path starts at another block."""
    before, model.path_start = model.path_start, block
    try:
        yield
    finally:
        model.path_start = before
