"""One section of a training step traced alone: the embedding, a block, the head with the loss, the optimizer update.

Alike blocks allocate alike, so each kind is traced once and a step is put together from such traces (`timeline`).
What crosses a section's border (tokens, their gradient, the record a block reports) is made by one section and freed
by another; it becomes a `Slot`, everything else a sum.
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

PHASES = ("forward", "handover", "backward", "after", "clear")


@dataclass(slots=True)
class Run:
    """A stretch of a section in which nothing crosses its border; bytes, and the same without gradients.

    Attributes:
        rise: most bytes alive over those at its start. net: how many more at its end.
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
    """A slot is made, or let go by this section."""

    slot: int
    made: bool


@dataclass(slots=True)
class Slot:
    """Memory that crosses the section's border.

    Attributes:
        reported: part of what the model's output holds until the end of the update.
    """

    bytes: int
    maker: str
    reported: bool = False


@dataclass(frozen=True, slots=True)
class Stream:
    """The tokens between two blocks, as far as they decide what the next one allocates.

    Attributes:
        shape: (B, N, D) of the features, or (B, C, H, W). origin: shape and strides of the original positions. place:
            the same of the tokens that patches were merged into.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    origin: tuple[tuple[int, ...], tuple[int, ...]] | None
    fused: bool
    place: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(slots=True)
class Section:
    """Attributes:
    phases: what happens in each of PHASES: runs and events, in order.
    inputs, outputs: slots of the tokens' features and traces, entering and leaving.
    reports: slots of what the balance loss looks at (importance and load), which are inputs of the head.
    gradient_in, gradient_out: slots of the tokens' gradient that arrives, and of the one that leaves.
    routing_in: slots of the gradients that arrive from the balance loss; of the head: those that leave to
        each block that routes.
    stream: the tokens that leave.
    routing: of importance and load, if they are reported: whether each requires a gradient.
    kept: bytes that the graph alone holds after the forward pass, slots apart, by maker.
    kept_slots: slots that the graph holds then.
    written: bytes that are kept on disk in place of memory.
    gradients: bytes of the parameters' gradients made here. trained: names of the parameters that got one.
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
    """The tensors at a section's border while it is traced, as allocations."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.imported: list[Allocation] = []
        self.arrived: list[Allocation] = []
        self.left: list[Tensor | None] = []
        self.anchor = torch.empty(0, requires_grad=True)

    def bring(self, shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> Tensor:
        """A tensor that another section made; its gradient is kept in `left`, at the place this call had."""
        place = len(self.left)
        self.left.append(None)
        if requires_grad:
            tensor = _Input.apply(self, place, self.anchor, shape, dtype)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=self.tracer.device)
        self.imported.append(self.tracer.allocation(tensor))
        return tensor

    def take(self, tensors: list[Tensor]) -> Tensor:
        """An empty tensor whose backward pass starts with gradients of these, made by other sections."""
        return _Output.apply(self, *tensors)


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx, border: Border, place: int, anchor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.border, ctx.place = border, place
        return torch.empty(shape, dtype=dtype, device=border.tracer.device)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.border.left[ctx.place] = grad
        if ctx.place == 0:  # of the tokens: the engine's last call
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
    """A section from a finished trace.

    Args:
        gradients: of parameters, made here. reported: held by the model's output. left: outputs, and gradients of
            inputs. kept: alive after the forward pass because the graph holds it.
        about: the section's other attributes; slots are given as allocations.
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
    """All tensors within dataclasses, dictionaries, lists and tuples."""
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
    """While the context lasts, the modules' own parameters and buffers are others, made from them.

    Args:
        modules: by name; their submodules are not looked at.
    Yields:
        The parameters that stand in, by name.
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
    """`standing_in` of fake tensors of the same shapes; to be entered within `fake_tensors`.

    Args:
        dtype: of each tensor.
    """
    return standing_in(modules, lambda tensor: empty(tensor.shape, dtype(tensor), device))
