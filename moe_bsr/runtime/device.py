"""Where and how to compute: device, precision, threads; and the peak of memory.

`prepare` chooses, and changes nothing. `Runtime.in_effect` is what `train` runs under: whatever it sets for
the whole process it puts back. `tune_process` changes a process for good, so only programs call it.
"""

import contextlib
import os
import platform
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from moe_bsr.config import ConfigError, RuntimeConfig, require
from moe_bsr.runtime import allocator
from moe_bsr.runtime import cpu_features as cpu
from moe_bsr.runtime.distributed import Alone, started_together

Placed = TypeVar("Placed", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Runtime:
    """A device and how to compute on it; make it with `prepare`.

    Attributes:
        precision: "fp32", or "bf16" for autocast with float32 master weights.
        precision_reason: one line on how precision was chosen.
        ranks: this process among those that train together.
    """

    device: torch.device
    precision: str
    threads: int
    precision_reason: str
    ranks: Alone = field(default_factory=Alone, compare=False, repr=False)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """For forward passes: autocast in bf16; float32 that is float32 (see `exact_convolutions`)."""
        if self.precision == "fp32":
            with exact_convolutions():
                yield
        else:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                yield

    @contextlib.contextmanager
    def in_effect(self) -> Iterator[None]:
        """For whole updates, backward passes included: this runtime's threads, and float32 that is float32.

        Afterwards the process is as it was.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with exact_convolutions() if self.precision == "fp32" else contextlib.nullcontext():
                yield
        finally:
            torch.set_num_threads(before)

    def place(self, model: Placed) -> Placed:
        """A `MultitaskViT` on the device, its frozen matrices in the type they are computed in."""
        if self.precision == "bf16":
            model.cast_frozen_(torch.bfloat16)  # type: ignore[operator]  # of MultitaskViT, which runtime/ does not know
        # CUDA's autocast would widen the stream to float32 in each LayerNorm, and keep it so for the backward.
        narrow = self.device.type == "cuda" and self.precision == "bf16"
        for module in model.modules():
            if hasattr(module, "_fast_norm"):  # timm's norm layers; its public switch is for the whole process
                module._fast_norm = narrow  # type: ignore[assignment]
        return model.to(self.device)

    def reset_peak(self) -> None:
        """Start a new measurement of the peak (Linux and CUDA; elsewhere it covers the process)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak_mb(self) -> float:
        """Peak memory in MB (2^20 bytes): CUDA's allocator, or resident memory of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**10
        unit = 2**20 if platform.system() == "Darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def prepare(config: RuntimeConfig, ranks: Alone | None = None) -> Runtime:
    """Choose device, precision and number of threads. Changes nothing in the process.

    Args:
        ranks: this process among several; by default it works alone.
    Raises:
        ConfigError: a device that is not there, more threads than this machine can use, or a launch of several
            processes for work of one.
    """
    if ranks is None and started_together():
        raise ConfigError(
            f"WORLD_SIZE = {os.environ.get('WORLD_SIZE')}: this is work of one process, only training is shared by "
            "several; start it without torchrun"
        )
    ranks = ranks or Alone()
    device = find_device(config.device)
    require(
        config.threads is None or config.threads <= most_threads(),
        "runtime.threads",
        config.threads,
        f"null or 1 to {most_threads()} on this machine of {os.cpu_count()} cores",
    )
    fast, why = bf16_is_fast(device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if fast else "fp32"
    else:
        why = "asked for"
    return Runtime(device, precision, config.threads or _threads(ranks), why, ranks)


def _threads(ranks: Alone) -> int:
    """Torch's choice, or where torchrun has set that to 1 this process's part of the machine's cores."""
    if ranks.local == 1 or torch.get_num_threads() > 1:
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks.local)


def most_threads() -> int:
    """That make any sense on this machine; some thousands end the process without a word."""
    return max(64, 4 * (os.cpu_count() or 1))


def tune_process(threads: int | None = None) -> None:
    """Set this process up for training, for good: memory is kept for reuse, and `threads` threads if given.

    For programs, at their start. A library that did this would change the program it is used in.
    """
    allocator.keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Inside, cuDNN computes float32 convolutions in float32.

    By default it takes TF32 (10 bits of mantissa), which makes the patch embedding 100 times less exact.
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def find_device(name: str) -> torch.device:
    """The device of a name as `runtime.device` has them; of several processes on one machine, each has its own GPU.

    Raises:
        ConfigError: it is not there.
    """
    try:
        if name in ("auto", "cuda") and started_together():
            name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()  # the device "meta" holds no values
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(
            f"runtime.device = {name!r}: {str(error).splitlines()[0]}; use auto, cpu or a device torch sees here"
        ) from error
    return device


def bf16_is_fast(device: torch.device) -> tuple[bool, str]:
    """Whether the device has instructions for it, and which."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0), torch.cuda.get_device_name(device)
    if device.type == "cpu":
        if found := cpu.bf16_instructions():
            return True, f"CPU with {found}"
    return False, f"no fast bf16 on this {device.type}"
