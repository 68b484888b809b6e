"""Measure the memory of a training step from the allocator's own events, on any device.

torch's profiler reports every allocation and release of the CPU's and CUDA's allocators in time order, with the
operator that caused it, including kernels' scratch memory. Their running sum is the number of bytes alive, relative to
the start. The memory alive after the forward pass is what is kept for the backward pass, however a storage keeps it.
Saved-tensor hooks, the usual way to measure, also see shapes and dtypes, but not the tensors of storages that install
hooks of their own. Memory outside torch's allocators (code, private buffers of libraries, freed memory that was not
returned) shows up only in the process's resident memory.
"""

import contextlib
from collections import Counter
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
    """One block of memory and its origin. It is equal only to itself, because addresses are reused.

    Attributes:
        bytes: as counted by the allocator (CUDA's rounds up to multiples of 512).
        section: name of the last `mark` before it in its phase.
        operators: the operators running at the time, outermost first.
    """

    pointer: int
    bytes: int
    phase: str
    section: str
    operators: tuple[str, ...]

    @property
    def maker(self) -> str:
        """Name of the autograd node or, outside a backward pass, of the outermost operator that allocated it."""
        return self.operators[0].removeprefix(ENGINE) if self.operators else "python"


@dataclass(slots=True)
class Trace:
    """Record of the allocations during some phases.

    Attributes:
        alive: allocations alive at the end of each phase.
        changes: every allocation (True) and release (False) in time order, with its phase.
    """

    alive: dict[str, list[Allocation]] = field(default_factory=dict)
    changes: list[tuple[str, bool, Allocation]] = field(default_factory=list)

    def at_peak(self, phase: str | None = None, without: Collection[Allocation] = ()) -> list[Allocation]:
        """Return the allocations alive at the peak, made since the first phase began; largest first.

        Args:
            phase: find the peak of this phase. Memory that is alive when it begins counts.
            without: allocations that do not count (gradients).
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
        """Return the bytes of `at_peak`."""
        return sum(a.bytes for a in self.at_peak(phase, without))


def mark(section: str) -> None:
    """Set the section of all following allocations, until the next mark or phase."""
    with record_function(SECTION + section):
        pass


def trace(phases: dict[str, Callable[[], Any]], device: torch.device) -> Trace:
    """Run each phase once, in order, and record the allocations on `device`.

    Releases of memory allocated before the first phase are not recorded. Return values of phases are dropped at once.
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
                    torch.empty(1, dtype=torch.int8, device=device)  # marks the phase in the allocator's history
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    events = sorted(_walk(profiler.profiler.kineto_results.experimental_event_tree(), ()), key=lambda e: e[0])
    made = _made(events, device.type)
    return _on_cpu(made) if device.type == "cpu" else _on_cuda(made, history)


def _made(events: list, device: str) -> Iterator[tuple[str, int, Allocation]]:
    """Yield (phase, bytes, allocation) for every event of the device's allocator, in order.

    Bytes are negative for a release. The start of a phase is an allocation of 0 bytes.
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
    """Combine the profiler's allocations with the history of CUDA's allocator. Only the latter has the releases."""
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
    """Context that records allocations and releases of CUDA's allocator. The list is filled at its end."""
    history: list[dict[str, Any]] = []
    torch.cuda.memory._record_memory_history(context=None, stacks="python", clear_history=True)
    try:
        yield history
    finally:
        index = torch.cuda.current_device() if device.index is None else device.index
        history += torch.cuda.memory._snapshot(device)["device_traces"][index]
        torch.cuda.memory._record_memory_history(enabled=None)


def _walk(events: list, operators: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...], Any]]:
    for event in events:
        yield event.start_time_ns, operators, event
        if event.tag != _EventType.Allocation:
            yield from _walk(event.children, (*operators, event.name))


@dataclass(slots=True)
class Measured:
    """Memory of a measured training step, in bytes.

    Attributes:
        kept: held after the forward pass for the backward pass, without the images.
        kept_by_block: `kept` by the section that allocated it ("embedding", "block 0" ..., "head"). A block's input
            belongs to the section before.
        records: held after the forward pass only because the caller holds the model's `Output`.
        peaks: peak relative to the start of the step, by phase (forward, backward, optimizer).
        transients: the same without the parameters' gradients.
        at_peak: the largest allocations alive at the highest of these peaks.
        process_peak: during a step, the process's resident memory (CPU) or the bytes allocated by CUDA's allocator.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    kept: int
    kept_by_block: dict[str, int]
    records: int
    peaks: dict[str, int]
    transients: dict[str, int]
    at_peak: list[Allocation]
    process_peak: int


def measure(step: TrainingStep, micro_batches: int = 1) -> Measured:
    """Measure a training step. Two steps run before, so that optimizer state and run-time copies exist.

    `kept` and its parts refer to one micro-batch. `peaks` include the gradients of earlier micro-batches, `transients`
    do not.

    Args:
        micro_batches: how many the step consists of.
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
    by_block: Counter[str] = Counter()
    for allocation in kept:
        by_block[allocation.section] += allocation.bytes
    apart = [a for a in whole.alive["backward"] if a.pointer in gradients]
    again = {phase: [f"{n} {phase}" for n in range(1, micro_batches)] for phase in PASSES} | {"optimizer": []}
    return Measured(
        parameters=held(model.parameters()),
        buffers=held(model.buffers()),
        gradients=sum(p.numel() * p.element_size() for p in step.trained),
        optimizer=held(v for state in step.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)),
        kept=by_block.total(),
        kept_by_block=dict(by_block),
        records=records,
        peaks={phase: max(map(whole.peak, (phase, *more))) for phase, more in again.items()},
        transients={phase: max(whole.peak(p, apart) for p in (phase, *more)) for phase, more in again.items()},
        at_peak=whole.at_peak()[:12],
        process_peak=process_peak,
    )


def kept_for_backward(step: TrainingStep) -> tuple[list[Allocation], int]:
    """Return the allocations that the loss holds after the forward pass, and the bytes that only `Output` holds."""

    def drop_output() -> None:
        step.output = None

    with _marked_blocks(step.model):
        alive = trace(
            {"forward": step.forward, "held by the loss": drop_output, "end": step.clear}, step.runtime.device
        ).alive
    kept = alive["held by the loss"]
    return kept, sum(a.bytes for a in alive["forward"]) - sum(a.bytes for a in kept)


def inference_peak(step: TrainingStep) -> int:
    """Return the peak in bytes of the step's forward pass under no_grad, relative to its start."""
    step.infer()
    return trace({"forward": step.infer}, step.runtime.device).peak()


@contextlib.contextmanager
def _marked_blocks(model: nn.Module) -> Iterator[None]:
    """Context in which our model's forward pass marks its sections. Other models have none."""
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
    """Return the bytes of the tensors' storages, counting each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
