"""Trace which memory a piece of code allocates and releases, and when, without computing anything.

The code runs on fake tensors, which have shapes, dtypes and a device but no memory. The tracer is a dispatch mode. It
sees every operator, records each storage that is allocated, and notices its release through a weak reference. This
covers autograd's saved tensors as well as all others. FLOPs are counted at the same time.

Fake tensors differ from real ones in two ways, which are corrected here. Autograd accumulates a second gradient into
a first one that nothing else holds, or writes one into zeros, in place; for fake tensors it allocates. And a
dispatch mode cannot see the scratch memory of kernels, which comes from the table in `kernel_scratch`.
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

VALUE = 1e6  # what `.item()` returns for every loss and norm: finite, and large enough for gradients to be clipped
IN_PLACE = {torch.ops.aten.add.Tensor, torch.ops.aten.index_put.default}  # in autograd's engine, with real tensors
WEIGHT_COPY = "weight copy"
ABSENT_GPU = (9, 0)  # the compute capability that is assumed for a GPU that this machine does not have
CUDA_BLOCK = 512  # bytes: torch's CUDA allocator rounds sizes up to multiples of it


@dataclass(slots=True, eq=False)
class Allocation:
    """One block of memory.

    Attributes:
        bytes: as rounded up by the allocator. size: bytes of the tensor itself.
        phase, section: `Tracer.phase` and `Tracer.section` at the time of the allocation.
        maker: name of the operator that allocated it, or `WEIGHT_COPY`.
    """

    bytes: int
    size: int
    phase: str
    section: str
    maker: str


@dataclass(slots=True)
class Trace:
    """Record of what a tracer saw.

    Attributes:
        changes: every allocation (True) and release (False) in order, with the phase in which it happened.
        flops: FLOPs by (phase, section).
    """

    changes: list[tuple[str, bool, Allocation]] = field(default_factory=list)
    flops: Counter[tuple[str, str]] = field(default_factory=Counter)

    def peak(self, phase: str | None = None, without: Collection[Allocation] = ()) -> int:
        """Return the peak of the bytes allocated since the trace began and not yet released.

        Args:
            phase: consider only moments of this phase. without: allocations that do not count.
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
    """Dispatch mode that follows the storages of one device. To be entered within `fake_tensors`.

    Attributes:
        phase, section: labels of all allocations from now on. The caller sets them as the traced code proceeds.
        alive: allocations that have not been released yet.
        written: bytes that the traced code would write to disk.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do without the wrapper that guards against `torch.compile`: it takes as long as the tracer itself."""
        return False

    def __init__(
        self,
        device: torch.device,
        scratch: Callable[[str, tuple, Any], int] = lambda name, args, result: 0,
        parameters: Iterable[Tensor] = (),
    ) -> None:
        """Make a tracer.

        Args:
            device: the device whose memory is followed.
            scratch: function (operator, arguments, result) -> scratch bytes of its kernel (`kernel_scratch`).
            parameters: tensors whose copies in another dtype are labeled `WEIGHT_COPY`.
        """
        super().__init__()
        self._parameters = {p.untyped_storage()._cdata for p in parameters}
        self.device, self._place, self.trace = device.type, device, Trace()
        # For a GPU that is absent, tensors report "meta": autograd's engine would look for the streams of a GPU.
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
        """Return the allocation behind a tensor; None if it was not made while the tracer was active."""
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
        """Record the allocation of a storage, and watch for its release."""
        storage = tensor.untyped_storage()
        size = taken = storage.nbytes()
        if tensor.device.type != self.device or not size:
            return
        if self.device == "cuda":
            taken = (size + CUDA_BLOCK - 1) // CUDA_BLOCK * CUDA_BLOCK
        key = storage._cdata
        self._alive[key] = allocation = Allocation(taken, size, self.phase, self.section, maker)
        self._watched[key] = weakref.ref(storage, partial(self._released, key))
        self.trace.changes.append((self.phase, True, allocation))

    def _released(self, key: int, _: weakref.ref) -> None:
        del self._watched[key]
        allocation = self._alive.pop(key)
        if self._sum is not None and key == self._sum[0]:
            # Nothing else held the first term. With real tensors the second would be added to it in place.
            _, total, position = self._sum
            self._sum = None
            if total in self._alive:
                del self.trace.changes[position]
                self._alive[total] = allocation
                return
        self.trace.changes.append((self.phase, False, allocation))

    def _note_sum(self, first: Tensor, result: Tensor) -> None:
        """Note that autograd's engine added two gradients of one tensor, which it may do in place."""
        key, total = (t.untyped_storage()._cdata for t in (first, result))
        dense = first.is_contiguous() or first.numel() == first.untyped_storage().nbytes() // first.element_size()
        if key in self._alive and total in self._alive and dense and first.dtype == result.dtype:
            self._sum = key, total, len(self.trace.changes) - 1


def _engine_calls(frame: Any) -> bool:
    """Whether autograd's engine itself called the operator, rather than Python code of a backward function."""
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
    """Context in which all tensors made are fake, on any device. `data_ptr` is distinct for distinct memory."""

    def address(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", address))
        # On a GPU, optimizers update all parameters at once, but only if their type is in this list.
        known = optimizer._foreach_supported_types
        stack.enter_context(mock.patch.object(optimizer, "_foreach_supported_types", [*known, FakeTensor]))
        if not torch.cuda.is_available():  # otherwise autocast for CUDA would be switched off
            stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", bool))
            stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_: True))
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: ABSENT_GPU))
        # In one thread: autograd's threads belong to devices, which may be absent.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FAKE)
        yield
