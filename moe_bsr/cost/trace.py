"""The tracer: which memory a piece of code allocates and frees, and when, without running it.

The code runs on fake tensors, which have shapes, types and a device but no memory. The tracer sees every operator,
notes the storages that are born and, by a weak reference to each, the moment at which they die: for autograd's
saved tensors as for all others. FLOPs are counted on the way.

Two things differ between fake and real tensors and are mended here. Where autograd adds a second gradient to
a first one that nobody else holds, or puts one into zeros, it does so in place, but not for fake tensors. And kernels'
scratch memory is seen by no dispatcher: `kernel_scratch` has a table of it.
"""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import _engine_run_backward
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from moe_bsr.cost import operators
from moe_bsr.cost.operators import FAKE
from moe_bsr.model.storage import offload

VALUE = 1e6  # of every loss and norm that Python reads: finite, and large enough for gradients to be clipped
IN_PLACE = {torch.ops.aten.add.Tensor, torch.ops.aten.index_put.default}  # of real tensors, within autograd's engine
WEIGHT_COPY = "weight copy"
ABSENT_GPU = (9, 0)  # the compute capability that a GPU is taken to have that is not here
CUDA_BLOCK = 512  # bytes: CUDA's allocator rounds up to multiples of it


@dataclass(slots=True, eq=False)
class Allocation:
    """One block of memory.

    Attributes:
        bytes: as the allocator counts them. size: of the tensor alone.
        maker: the operator that asked for it, in a backward pass with the autograd node before it.
    """

    bytes: int
    size: int
    phase: str
    section: str
    maker: str


@dataclass(slots=True)
class Trace:
    """Attributes:
    changes: every allocation (True) and release (False) in order, with the phase in which it happened.
    flops: by (phase, section).
    """

    changes: list[tuple[str, bool, Allocation]] = field(default_factory=list)
    flops: Counter[tuple[str, str]] = field(default_factory=Counter)

    def peak(self, phase: str | None = None, without: Collection[Allocation] = ()) -> int:
        """Most bytes alive at one moment (of a phase) over what lived before the trace.

        Args:
            without: allocations that do not count.
        """
        without, live, most = set(without), 0, 0
        for within, made, allocation in self.changes:
            if phase in (None, within):
                most = max(most, live)
            if allocation not in without:
                live += allocation.bytes if made else -allocation.bytes
            if phase in (None, within):
                most = max(most, live)
        return most

    def phase_flops(self, phase: str) -> int:
        return sum(flops for (within, _), flops in self.flops.items() if within == phase)


class Tracer(TorchDispatchMode):
    """Follows the storages of one device while it is active, within `FAKE`.

    Attributes:
        phase, section: names for what is allocated from here on; set them as the traced code goes on.
        alive: what has been allocated and not freed yet.
        written: bytes that the traced code would write to disk.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """A wrapper that protects from `torch.compile` would take as long as the tracer itself."""
        return False

    def __init__(
        self,
        device: torch.device,
        scratch: Callable[[str, tuple, Any], int] = lambda name, args, result: 0,
        parameters: Iterable[Tensor] = (),
    ) -> None:
        """Args:
        device: the one whose memory is followed. scratch: bytes a kernel uses for itself (`kernel_scratch`).
        parameters: whose copies in another type are told apart from other copies.
        """
        super().__init__()
        self._parameters = {p.untyped_storage()._cdata for p in parameters}
        self.device, self._place, self.trace = device.type, device, Trace()
        # What torch's own code is told, which would look for the device: autograd's engine for its streams.
        self._absent = torch.device("meta") if device.type == "cuda" and not torch.cuda.is_available() else None
        self.phase, self.section, self.written = "", "", 0
        self._scratch, self._known_scratch = scratch, {}
        self._alive: dict[int, Allocation] = {}
        self._watched: dict[int, weakref.ref] = {}
        self._sum: tuple[int, int, int] | None = None

    @property
    def alive(self) -> Collection[Allocation]:
        return self._alive.values()

    def __enter__(self):
        self._counting = offload.counting(self._write)
        self._counting.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._counting.__exit__(*error)

    def _write(self, size: int) -> None:
        self.written += size

    def allocation(self, tensor: Tensor) -> Allocation | None:
        """The memory of a tensor; None if it was not allocated while the tracer was active."""
        return self._alive.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return self._absent or args[0].device
        self._sum = None
        if func is torch.ops.aten._local_scalar_dense.default:
            return VALUE if args[0].dtype.is_floating_point else 1
        kwargs = kwargs or {}
        if self._absent is not None and kwargs.get("device") == self._absent:
            kwargs = kwargs | {"device": self._place}
        result, effect, alike = operators.run(func, args, kwargs)
        if effect.flops:
            self.trace.flops[self.phase, self.section] += effect.flops
        if effect.news:
            outputs = result if isinstance(result, tuple | list) else (result,)
            for place in effect.news:
                self._follow(outputs[place], self._maker(effect.name, args))
            if func in IN_PLACE and _engine_calls(sys._getframe(1)):
                self._note_sum(args[0], result)
        scratch = self._scratch_of(effect, alike, args, result)
        if scratch:
            scratch = Allocation(scratch, scratch, self.phase, self.section, effect.name)
            self.trace.changes += ((self.phase, True, scratch), (self.phase, False, scratch))
        return result

    def _maker(self, name: str, args: tuple) -> str:
        if name == "_to_copy" and args[0].untyped_storage()._cdata in self._parameters:
            return WEIGHT_COPY
        return name

    def _scratch_of(self, effect: operators.Effect, alike: bool, args: tuple, result: Any) -> int:
        if not alike:
            return self._scratch(effect.name, args, result)
        known = self._known_scratch.get(effect)
        if known is None:
            known = self._known_scratch[effect] = self._scratch(effect.name, args, result)
        return known

    def _follow(self, tensor: Tensor, maker: str) -> None:
        """Note the birth of a storage, and arrange to be told of its death."""
        storage = tensor.untyped_storage()
        size = taken = storage.nbytes()
        if tensor.device.type != self.device or not size:
            return
        if self.device == "cuda":
            taken = (size + CUDA_BLOCK - 1) // CUDA_BLOCK * CUDA_BLOCK
        key = storage._cdata
        self._alive[key] = allocation = Allocation(taken, size, self.phase, self.section, maker)
        self._watched[key] = weakref.ref(storage, partial(self._died, key))
        self.trace.changes.append((self.phase, True, allocation))

    def _died(self, key: int, _: weakref.ref) -> None:
        del self._watched[key]
        allocation = self._alive.pop(key)
        if self._sum is not None and key == self._sum[0]:
            # Nobody else held the first term: with real tensors the second is added in place.
            _, total, birth = self._sum
            self._sum = None
            if total in self._alive:
                del self.trace.changes[birth]
                self._alive[total] = allocation
                return
        self.trace.changes.append((self.phase, False, allocation))

    def _note_sum(self, first: Tensor, result: Tensor) -> None:
        """Autograd's engine adds two gradients of one tensor."""
        key, total = (t.untyped_storage()._cdata for t in (first, result))
        dense = first.is_contiguous() or first.numel() == first.untyped_storage().nbytes() // first.element_size()
        if key in self._alive and total in self._alive and dense and first.dtype == result.dtype:
            self._sum = key, total, len(self.trace.changes) - 1


def _engine_calls(frame: Any) -> bool:
    """Whether autograd's engine asked for an operator itself, and no Python code within a backward."""
    for _ in range(3):
        if frame is None:
            return False
        if frame.f_code is _engine_run_backward.__code__:
            return True
        if not frame.f_code.co_filename.endswith("_dynamo/eval_frame.py"):
            return False
        frame = frame.f_back
    return False


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """A region whose tensors are fake, of any device; they have addresses, as different tensors have different ones."""

    def address(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", address))
        # Optimizers take all parameters at once on a GPU, but only if they know their type.
        known = optimizer._foreach_supported_types
        stack.enter_context(mock.patch.object(optimizer, "_foreach_supported_types", [*known, FakeTensor]))
        if not torch.cuda.is_available():  # or autocast for it would be switched off
            stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", bool))
            stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_: True))
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: ABSENT_GPU))
        # In one thread: the engine's threads belong to devices, which may not be here.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FAKE)
        yield
