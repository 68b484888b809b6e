"""Describe one traced section of a training step: the embedding, a block, or the head with the loss.

Blocks of the same kind allocate the same memory. Each kind is therefore traced once, and `timeline` puts a step
together from these traces. Tensors that cross a section's border (tokens, their gradient, the record that a block
reports) are allocated by one section and released by another. They become `Slot`s. All other memory is summed up.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_bsr.cost.operators import empty
from moe_bsr.cost.trace import Allocation, Tracer

PHASES = ("forward", "handover", "backward", "after")  # others are not recorded


@dataclass(slots=True)
class Run:
    """Consecutive allocations and releases of a section that do not concern its slots, summed up. All in bytes.

    Attributes:
        rise: peak relative to the start of the run. net: difference between its end and its start.
        rise_without, net_without: the same without gradients of parameters.
    """

    rise: int = 0
    net: int = 0
    rise_without: int = 0
    net_without: int = 0

    def add(self, size: int, is_gradient: bool) -> None:
        self.net += size
        self.rise = max(self.rise, self.net)
        if not is_gradient:
            self.net_without += size
            self.rise_without = max(self.rise_without, self.net_without)


@dataclass(slots=True)
class Event:
    """The section allocates a slot's memory (`made`) or gives up its reference to it."""

    slot: int
    made: bool


@dataclass(slots=True)
class Slot:
    """Memory that crosses the section's border.

    Attributes:
        maker: the operator that allocated it. reported: whether the model's output holds it until the update ends.
    """

    bytes: int
    maker: str
    reported: bool = False


@dataclass(frozen=True, slots=True)
class Stream:
    """Properties of the tokens between two blocks that decide what the next block allocates.

    Attributes:
        shape: (B, N, D) of the features, or (B, C, H, W). dtype, requires_grad: of the features.
        origin: shape and strides of `Tokens.origin`, the original patch indices; None for maps.
        fused: whether the last token is a fused one.
        place: shape and strides of `Tokens.place`, the token that each patch was merged into; None without merging.
        class_tokens: shape and dtype of `Tokens.class_tokens`, and whether they require a gradient; None without.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    origin: tuple[tuple[int, ...], tuple[int, ...]] | None
    fused: bool
    place: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    class_tokens: tuple[tuple[int, ...], torch.dtype, bool] | None = None


@dataclass(slots=True)
class Section:
    """Trace of one section. Tuples of integers are indices into `slots`.

    Attributes:
        phases: for each of PHASES, the runs and events in order.
        kept: by maker, bytes that only the graph holds after the forward pass, without slots.
        kept_slots: slots that the graph holds after the forward pass.
        gradients: bytes of the parameters' gradients that are allocated here.
        inputs, outputs: slots of the tokens (features, origin, place, class tokens) that enter and leave.
        reports: slots of importance and load, from which the head computes the balance loss.
        gradient_in, gradient_out: slots of the gradients (of features, class tokens) that arrive and are passed on.
        routing_in: slots of the balance loss's gradients that arrive. In the head: of those it sends to each block
            that routes.
        stream: the tokens that leave.
        routing: whether importance and load require a gradient; empty if the block does not route.
        trained: names of the parameters that have a gradient after the backward pass.
        written: bytes that are kept on disk instead of in memory.
    """

    phases: dict[str, list[Run | Event]]
    slots: list[Slot]
    kept: Counter[str]
    kept_slots: tuple[int, ...]
    gradients: int
    forward_flops: int
    backward_flops: int
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    reports: tuple[int, ...] = ()
    gradient_in: tuple[int, ...] = ()
    gradient_out: tuple[int, ...] = ()
    routing_in: tuple[int, ...] = ()
    stream: Stream | None = None
    routing: tuple[bool, ...] = ()
    trained: frozenset[str] = frozenset()
    written: int = 0


class Border:
    """Tensors at a section's border while it is traced.

    Attributes:
        imported: allocations of the tensors that entered in the forward pass. arrived: of the gradients that entered.
        left: for each call of `bring`, the gradient that left; None if there was none.
    """

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.imported: list[Allocation] = []
        self.arrived: list[Allocation] = []
        self.left: list[Tensor | None] = []
        self.anchor = torch.empty(0, requires_grad=True)

    def bring(self, shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> Tensor:
        """Return a tensor that stands for another section's output. Its gradient is put into `left`."""
        place = len(self.left)
        self.left.append(None)
        if requires_grad:
            tensor = _Input.apply(self, place, self.anchor, shape, dtype)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=self.tracer.device)
        self.imported.append(self.tracer.allocation(tensor))
        return tensor

    def take(self, tensors: list[Tensor]) -> Tensor:
        """Return an empty tensor whose backward pass gives these tensors gradients as if from other sections."""
        return _Output.apply(self, *tensors)


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx, border: Border, place: int, anchor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.border, ctx.place = border, place
        return torch.empty(shape, dtype=dtype, device=border.tracer.device)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.border.left[ctx.place] = grad
        if ctx.place == 0:  # the tokens: the last node of the backward pass
            ctx.border.tracer.phase = "after"
        return None, None, None, None, None


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx, border: Border, *tensors: Tensor) -> Tensor:
        ctx.border, ctx.like = border, [(t.shape, t.dtype, t.device) for t in tensors]
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx, _: Tensor):
        made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        ctx.border.arrived += [ctx.border.tracer.allocation(t) for t in made]
        return None, *made


def summarize(
    tracer: Tracer,
    border: Border,
    gradients: list[Allocation],
    reported: list[Allocation],
    left: list[Allocation],
    kept: list[Allocation],
    **about: Any,
) -> Section:
    """Make a section from a finished trace.

    Args:
        gradients: parameters' gradients that were allocated here. reported: allocations that the model's output holds.
        left: outputs and gradients of inputs. kept: allocations that the graph holds after the forward pass.
        about: other attributes of `Section`, with allocations in place of slots.
    """
    outside = dict.fromkeys([*border.imported, *border.arrived])
    crossing = list(dict.fromkeys([*outside, *reported, *left]))
    number = {allocation: i for i, allocation in enumerate(crossing)}
    held = set(reported)
    slots = [Slot(a.bytes, a.maker, a in held) for a in crossing]
    phases: dict[str, list[Run | Event]] = {phase: [] for phase in PHASES}
    special = set(gradients)
    for phase, made, allocation in tracer.trace.changes:
        if phase not in phases:
            continue
        events = phases[phase]
        if allocation in number:
            if not (made and allocation in outside):
                events.append(Event(number[allocation], made))
            continue
        if not events or isinstance(events[-1], Event):
            events.append(Run())
        events[-1].add(allocation.bytes if made else -allocation.bytes, allocation in special)
    inside = Counter()
    for allocation in kept:
        if allocation not in number:
            inside[allocation.maker] += allocation.bytes
    for name in ("inputs", "outputs", "reports", "gradient_in", "gradient_out", "routing_in"):
        about[name] = tuple(number[a] for a in about.get(name, ()))
    return Section(
        phases=phases,
        slots=slots,
        kept=inside,
        kept_slots=tuple(number[a] for a in kept if a in number),
        gradients=sum(a.size for a in gradients),
        forward_flops=tracer.trace.phase_flops("forward"),
        backward_flops=tracer.trace.phase_flops("backward"),
        written=tracer.written,
        **about,
    )


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested dataclasses, dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from tensors_of(getattr(value, part.name))
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)


@contextlib.contextmanager
def standing_in(modules: dict[str, nn.Module], make: Callable[[Tensor], Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """Context in which the modules' own parameters and buffers are replaced by tensors made from them.

    Args:
        modules: by name; submodules are ignored. make: returns the replacement of a tensor.

    Yields:
        The replaced parameters, by name.
    """
    made: dict[int, Tensor] = {}
    parameters: dict[str, nn.Parameter] = {}
    saved: list[tuple[dict, dict]] = []
    try:
        for prefix, module in modules.items():
            for tensors in (module._parameters, module._buffers):
                saved.append((tensors, dict(tensors)))
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        value = made[id(tensor)] = make(tensor)
                        if isinstance(tensor, nn.Parameter):
                            value.requires_grad_(tensor.requires_grad)
                            value._is_param = True  # as `nn.Parameter` does
                            parameters[f"{prefix}.{name}".removeprefix(".")] = value
                    tensors[name] = made[id(tensor)]
        yield parameters
    finally:
        for tensors, before in saved:
            tensors.update(before)


def fake_parameters(
    modules: dict[str, nn.Module], device: torch.device, dtype: Callable[[Tensor], torch.dtype]
) -> contextlib.AbstractContextManager[dict[str, nn.Parameter]]:
    """Return `standing_in` with fake tensors of the same shapes. To be entered within `fake_tensors`.

    Args:
        dtype: function that returns the dtype of a parameter or buffer while training.
    """
    return standing_in(modules, lambda tensor: empty(tensor.shape, dtype(tensor), device))
