"""The meter: what a training step truly allocates, from the allocator's own events, on any device.

torch's profiler reports every allocation and every release of the CPU's and CUDA's allocators in time
order, kernel scratch included, with the operator that asked for it. Adding them up gives the bytes alive
at any moment over what lived before; what is alive after the forward pass is what the backward pass
keeps, however a storage keeps it. Saved-tensor hooks, the usual meter, see shapes and types as well, but
are blind to storages that install hooks of their own (`saved_storages`). What no torch allocator hands
out (code, libraries' private buffers, freed memory not yet returned) is in the process's resident memory.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from moe_bsr.benchmark.kineto import quiet_kineto
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.training.update import TrainingStep

PHASE, SECTION = "meter phase ", "meter section "
ENGINE = "autograd::engine::evaluate_function: "
PASSES = ("forward", "backward")


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """One block of memory and where it came from; equal only to itself, for addresses are used again.

    Attributes:
        bytes: as the allocator counts them (CUDA's rounds up to multiples of 512).
        section: the last `mark` before it in its phase.
        operators: the operators running at the time, outermost first.
    """

    pointer: int
    bytes: int
    phase: str
    section: str
    operators: tuple[str, ...]

    @property
    def maker(self) -> str:
        """The autograd node, or else the outermost operator, that asked for it."""
        return self.operators[0].removeprefix(ENGINE) if self.operators else "python"


@dataclass(slots=True)
class Trace:
    """What was allocated while phases ran.

    Attributes:
        alive: the allocations alive at the end of each phase.
        changes: every allocation (True) and release (False), in time order.
    """

    alive: dict[str, list[Allocation]] = field(default_factory=dict)
    changes: list[tuple[str, bool, Allocation]] = field(default_factory=list)

    def at_peak(self, phase: str | None = None, without: Collection[Allocation] = ()) -> list[Allocation]:
        """What was alive when most was, over what lived before the first phase; largest first.

        Args:
            phase: look at this one alone; what is alive when it begins counts in it.
            without: allocations not to count (gradients).
        """
        without = set(without)
        live, most, best = 0, 0, 0
        for index, (within, made, allocation) in enumerate(self.changes):
            if phase in (None, within) and live > most:
                most, best = live, index
            if allocation not in without:
                live += allocation.bytes if made else -allocation.bytes
            if phase in (None, within) and live > most:
                most, best = live, index + 1
        alive: set[Allocation] = set()
        for _, made, allocation in self.changes[:best]:
            (alive.add if made else alive.discard)(allocation)
        return sorted(alive - without, key=lambda a: -a.bytes)

    def peak(self, phase: str | None = None, without: Collection[Allocation] = ()) -> int:
        return sum(a.bytes for a in self.at_peak(phase, without))


def mark(section: str) -> None:
    """Name the section of what is allocated from here on, until the next mark or phase."""
    with record_function(SECTION + section):
        pass


def trace(phases: dict[str, Callable[[], Any]], device: torch.device) -> Trace:
    """Run each phase once, in order, and record what is allocated on `device`.

    Releases of what lived before the first phase are not seen. A phase's result is dropped at once.
    """
    recording = contextlib.nullcontext([]) if device.type == "cpu" else _cuda_history(device)
    with (
        quiet_kineto(),
        recording as history,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        for name, run in phases.items():
            with record_function(PHASE + name):
                if device.type == "cuda":
                    torch.empty(1, dtype=torch.int8, device=device)  # a mark in the allocator's history
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    events = sorted(_walk(profiler.profiler.kineto_results.experimental_event_tree(), ()), key=lambda e: e[0])
    made = _made(events, device.type)
    return _on_cpu(made) if device.type == "cpu" else _on_cuda(made, history)


def _made(events: list, device: str) -> Iterator[tuple[str, int, Allocation]]:
    """(phase, bytes, allocation) of every event of the device's allocator, in order: negative bytes are released.

    The start of a phase comes as an allocation of 0 bytes.
    """
    phase = section = ""
    for _, operators, event in events:
        if event.tag != _EventType.Allocation:
            if event.name.startswith(PHASE):
                phase, section = event.name.removeprefix(PHASE), ""
                yield phase, 0, Allocation(0, 0, phase, "", ())
            elif event.name.startswith(SECTION):
                section = event.name.removeprefix(SECTION)
            continue
        about = event.extra_fields
        if about.device.type == device and about.alloc_size:
            yield phase, about.alloc_size, Allocation(about.ptr, about.alloc_size, phase, section, operators)


def _on_cpu(made: Iterable[tuple[str, int, Allocation]]) -> Trace:
    result, live, phase = Trace(), {}, ""
    for within, size, allocation in made:
        if size == 0:
            result.alive[phase] = list(live.values())
        elif size > 0:
            live[allocation.pointer] = allocation
            result.changes.append((within, True, allocation))
        elif allocation.pointer in live:
            result.changes.append((within, False, live.pop(allocation.pointer)))
        phase = within
    result.alive[phase] = list(live.values())
    result.alive.pop("", None)
    return result


def _on_cuda(made: Iterable[tuple[str, int, Allocation]], history: list[dict[str, Any]]) -> Trace:
    """The profiler hears of what CUDA's allocator hands out alone; the allocator's history has the releases too."""
    result, live, phase = Trace(), {}, ""
    made = (allocation for _, size, allocation in made if size > 0)
    for entry in history:
        if entry["action"] == "free_completed" and entry["addr"] in live:
            result.changes.append((phase, False, live.pop(entry["addr"])))
        if entry["action"] != "alloc":
            continue
        allocation = next(made)
        if any(name.startswith(PHASE) for name in allocation.operators):
            result.alive[phase] = list(live.values())
            phase = allocation.phase
        else:
            live[allocation.pointer] = allocation
            result.changes.append((phase, True, allocation))
    result.alive[phase] = list(live.values())
    result.alive.pop("", None)
    return result


@contextlib.contextmanager
def _cuda_history(device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """What CUDA's allocator hands out and takes back while the context lasts; filled at its end."""
    history: list[dict[str, Any]] = []
    torch.cuda.memory._record_memory_history(context=None, stacks="python", clear_history=True)
    try:
        yield history
    finally:
        history += torch.cuda.memory._snapshot(device)["device_traces"][device.index or torch.cuda.current_device()]
        torch.cuda.memory._record_memory_history(enabled=None)


def _walk(events: list, operators: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...], Any]]:
    for event in events:
        yield event.start_time_ns, operators, event
        if event.tag != _EventType.Allocation:
            yield from _walk(event.children, (*operators, event.name))


def saved_storages(run: Callable[[], Any], exclude: list[Tensor]) -> list[Tensor]:
    """Tensors handed to autograd's saved-tensor hooks while `run` runs, one for each storage.

    Args:
        exclude: tensors whose storages somebody else holds (parameters, buffers, the images).
    """
    saved: dict[int, Tensor] = {}
    known = {t.untyped_storage().data_ptr() for t in exclude}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            saved.setdefault(pointer, tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result  # held until here, so that no pointer was used twice
    return list(saved.values())


@dataclass(slots=True)
class Measured:
    """A training step as it was; everything in bytes.

    Attributes:
        kept: alive after the forward pass for the backward pass, the images not counted.
        kept_by_block: the same by the section that made it ("embedding", "block 0" ..., "head"); a block's
            input was made by the one before.
        kept_by_maker: the same by block and by the operator that made it.
        records: alive after the forward pass only because the caller holds the model's `Output`.
        peaks: most bytes alive over what lived before the step, by phase (forward, backward, optimizer).
        transients: the same without the gradients of the parameters.
        at_peak: the largest allocations alive at the highest of these peaks.
        process_peak: during a step: resident memory of the process (CPU) or CUDA's allocated bytes.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    kept: int
    kept_by_block: dict[str, int]
    kept_by_maker: dict[str, dict[str, int]]
    records: int
    peaks: dict[str, int]
    transients: dict[str, int]
    at_peak: list[Allocation]
    process_peak: int


def measure(step: TrainingStep, micro_batches: int = 1) -> Measured:
    """Measure a training step of so many micro-batches. Two are run before: optimizer state and run-time copies exist.

    `kept` and its parts are of one micro-batch; gradients of earlier ones are in the peaks, and not in `transients`.
    """
    model, device = step.model, step.runtime.device
    for _ in range(2):
        step.run()
    step.runtime.reset_peak()
    step.run()
    process_peak = round(step.runtime.peak_mb() * 2**20)

    gradients: set[int] = set()

    def note_gradients() -> None:
        gradients.update(p.grad.untyped_storage().data_ptr() for p in step.trained)

    kept, records = kept_for_backward(step)
    with _marked_blocks(model):
        whole = trace(
            {
                "forward": step.forward,
                "backward": step.backward,
                "note": note_gradients,
                **{f"{n} {phase}": getattr(step, phase) for n in range(1, micro_batches) for phase in PASSES},
                "optimizer": step.step,
                "end": step.clear,
            },
            device,
        )
    by_block, by_maker = Counter(), defaultdict(Counter)
    for allocation in kept:
        by_block[allocation.section] += allocation.bytes
        by_maker[allocation.section][allocation.maker] += allocation.bytes
    apart = [a for a in whole.alive["backward"] if a.pointer in gradients]
    again = {phase: [f"{n} {phase}" for n in range(1, micro_batches)] for phase in PASSES} | {"optimizer": []}
    return Measured(
        parameters=held(model.parameters()),
        buffers=held(model.buffers()),
        gradients=sum(p.numel() * p.element_size() for p in step.trained),
        optimizer=held(v for state in step.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)),
        kept=by_block.total(),
        kept_by_block=dict(by_block),
        kept_by_maker={block: dict(makers) for block, makers in by_maker.items()},
        records=records,
        peaks={phase: max(map(whole.peak, (phase, *more))) for phase, more in again.items()},
        transients={phase: max(whole.peak(p, apart) for p in (phase, *more)) for phase, more in again.items()},
        at_peak=whole.at_peak()[:12],
        process_peak=process_peak,
    )


def kept_for_backward(step: TrainingStep) -> tuple[list[Allocation], int]:
    """What is alive after the forward pass because the loss holds it, and the bytes the `Output` holds."""

    def drop_output() -> None:
        step.output = None

    with _marked_blocks(step.model):
        alive = trace(
            {"forward": step.forward, "held by the loss": drop_output, "end": step.clear}, step.runtime.device
        ).alive
    kept = alive["held by the loss"]
    return kept, sum(a.bytes for a in alive["forward"]) - sum(a.bytes for a in kept)


def inference_peak(step: TrainingStep) -> int:
    """Most bytes alive over what lived before in the step's forward pass alone, under no_grad."""
    step.infer()
    return trace({"forward": step.infer}, step.runtime.device).peak()


@contextlib.contextmanager
def _marked_blocks(model: nn.Module) -> Iterator[None]:
    """Name the sections of the forward pass of our model while the context lasts; others have none."""
    if not isinstance(model, MultitaskViT):
        yield
        return
    run_stem, run_block = model.forward_features, model.run_block

    def forward_features(*arguments: Any) -> Any:
        mark("embedding")
        return run_stem(*arguments)

    def block(index: int, *arguments: Any) -> Any:
        mark(f"block {index}")
        return run_block(index, *arguments)

    model.forward_features, model.run_block = forward_features, block
    norm = model.vit.norm.register_forward_pre_hook(lambda *_: mark("head"))
    try:
        yield
    finally:
        del model.forward_features, model.run_block
        norm.remove()


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
