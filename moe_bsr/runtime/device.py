"""Choose device, precision and number of threads, and measure peak memory.

`prepare` chooses and changes nothing. `train` runs under the context `Runtime.in_effect`, which restores all
process-wide settings at its end. `tune_process` changes the process permanently, so only programs call it.
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
    """A device and how to compute on it. Make it with `prepare`.

    Attributes:
        precision: "fp32", or "bf16" for autocast with float32 master weights.
        threads: number of CPU threads of torch.
        precision_reason: one line on how the precision was chosen.
        ranks: communication with the other processes of the run (`Alone` if there are none).
    """

    device: torch.device
    precision: str
    threads: int
    precision_reason: str
    ranks: Alone = field(default_factory=Alone, compare=False, repr=False)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Context for forward passes: autocast if bf16, else convolutions in exact float32."""
        if self.precision == "fp32":
            with exact_convolutions():
                yield
        else:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                yield

    @contextlib.contextmanager
    def in_effect(self) -> Iterator[None]:
        """Context for whole updates, including backward passes.

        Sets this runtime's number of threads and, in fp32, exact float32 convolutions. Restores both at its end.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with exact_convolutions() if self.precision == "fp32" else contextlib.nullcontext():
                yield
        finally:
            torch.set_num_threads(before)

    def place(self, model: Placed) -> Placed:
        """Move a `MultitaskViT` to the device, with its frozen matrices in the dtype they are computed in.

        Changes the model in place and returns it.
        """
        if self.precision == "bf16":
            model.cast_frozen_(torch.bfloat16)  # type: ignore[operator]  # a method of MultitaskViT
        # CUDA's autocast would cast activations to float32 in each LayerNorm and save them so for the backward pass.
        narrow = self.device.type == "cuda" and self.precision == "bf16"
        for module in model.modules():
            if hasattr(module, "_fast_norm"):  # timm's norm layers. timm's public switch would set the whole process.
                module._fast_norm = narrow  # type: ignore[assignment]
        return model.to(self.device)

    def reset_peak(self) -> None:
        """Reset the peak that `peak_mb` reports (Linux and CUDA only; elsewhere it covers the process's life)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak_mb(self) -> float:
        """Return peak memory in MB (2^20 bytes): of CUDA's allocator, or the process's resident memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**10
        unit = 2**20 if platform.system() == "Darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def prepare(config: RuntimeConfig, ranks: Alone | None = None) -> Runtime:
    """Choose device, precision and number of threads. Change nothing in the process.

    Args:
        ranks: communication with the other processes. None: this process works alone.
    Raises:
        ConfigError: the device does not exist, there are more threads than this machine can use, or torchrun started
            several processes for work that one process does.
    """
    if ranks is None and started_together():
        raise ConfigError(
            f"WORLD_SIZE = {os.environ.get('WORLD_SIZE')}: only training can be split over several processes, and this "
            "is work of one process; start it without torchrun"
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
    """Return torch's choice, or this process's share of the cores if torchrun has set that choice to 1."""
    if ranks.local == 1 or torch.get_num_threads() > 1:
        return torch.get_num_threads()
    return max(1, cores() // ranks.local)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_threads() -> int:
    """Return the most threads to allow on this machine. Some thousands end the process without a message."""
    return max(64, 4 * (os.cpu_count() or 1))


def tune_process(threads: int | None = None) -> None:
    """Set this process up for training, permanently: keep freed memory for reuse, and set torch's number of threads.

    Programs call this at their start. The library never does, as it would change the program that uses it.

    Args:
        threads: None leaves torch's number.
    """
    allocator.keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Context in which cuDNN computes float32 convolutions in float32.

    By default it uses TF32 (10 bits of mantissa), which makes the error of the patch embedding 100 times larger.
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def find_device(name: str) -> torch.device:
    """Return the device for a value of `runtime.device`. Processes that torchrun started get one GPU each.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        if name in ("auto", "cuda") and started_together():
            name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()  # fails for the device "meta" too, which holds no values
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(
            f"runtime.device = {name!r}: {str(error).splitlines()[0]}; use auto, cpu or a device torch sees here"
        ) from error
    return device


def bf16_is_fast(device: torch.device) -> tuple[bool, str]:
    """Return whether the device has fast bf16 instructions, and the reason in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0), torch.cuda.get_device_name(device)
    if device.type == "cpu":
        if found := cpu.bf16_instructions():
            return True, f"CPU with {found}"
    return False, f"no fast bf16 on this {device.type}"
