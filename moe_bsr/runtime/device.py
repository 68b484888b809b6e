"""What this machine is and how to use it well: device, precision, threads, memory.

The choices are made once at the start of a run and written into it.
"""

import contextlib
import ctypes
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import set_fast_norm
from torch import nn

from moe_bsr.config import ConfigError, RuntimeConfig
from moe_bsr.runtime import cpu_features as cpu


@dataclass(frozen=True, slots=True)
class Runtime:
    """A device and how to compute on it; make it with `prepare`.

    Attributes:
        precision: "fp32", or "bf16" for autocast with float32 master weights.
        precision_reason: one line on how precision was chosen.
    """

    device: torch.device
    precision: str
    threads: int
    precision_reason: str

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def place(self, model: nn.Module) -> nn.Module:
        """A `MultitaskViT` on the device, its frozen matrices in the type they are computed in."""
        if self.precision == "bf16":
            model.cast_frozen_(torch.bfloat16)
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


def prepare(config: RuntimeConfig) -> Runtime:
    """Choose device and precision, set the thread count and the allocator.

    Raises:
        ConfigError: a device that is not there, or a launch on several processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ConfigError(
            f"WORLD_SIZE = {world}: training on several processes is not supported; start one process, without torchrun"
        )
    device = find_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    fast, why = bf16_is_fast(device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if fast else "fp32"
    else:
        why = "asked for"
    # CUDA's autocast would widen the stream to float32 in each LayerNorm, and keep it so for the backward.
    set_fast_norm(device.type == "cuda" and precision == "bf16")
    return Runtime(device, precision, torch.get_num_threads(), why)


def find_device(name: str) -> torch.device:
    """The device of a name as `runtime.device` has them.

    Raises:
        ConfigError: it is not there.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"runtime.device = {name!r}: {str(error).splitlines()[0]}; use auto, cpu or a device torch sees here"
        ) from error
    return device


def keep_freed_memory() -> None:
    """Stop glibc from giving freed memory back to the kernel at every large tensor.

    By default each large allocation is a fresh mapping whose pages fault in one by one, which makes
    elementwise kernels 4 to 5 times slower. The price is that resident memory stays at its peak.
    """
    if platform.system() == "Linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            m_trim_threshold, m_mmap_max, m_mxfast = -1, -4, 1
            libc.mallopt(m_mxfast, 0)  # chips between aligned blocks join them again; see tools/allocator.py
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)


def bf16_is_fast(device: torch.device) -> tuple[bool, str]:
    """Whether the device has instructions for it, and which."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0), torch.cuda.get_device_name(device)
    if device.type == "cpu":
        if found := cpu.bf16_instructions():
            return True, f"CPU with {found}"
    return False, f"no fast bf16 on this {device.type}"
