"""Features of this CPU that decide which kernel is the fastest.

They are read from the system and never timed, so the same CPU always selects the same kernels and computes the same
bits.
"""

import contextlib
import functools
import platform
from pathlib import Path

import torch

# Flags on which the choice of kernels and their rounding depend: x86, then Arm.
DECISIVE_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "i8mm", "bf16", "sve", "sve2"),
)


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first CPU in /proc/cpuinfo, by name. Empty if there is no such file (not Linux)."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return fields


def name() -> str:
    """Return the CPU's model name, or its architecture if the model is unknown."""
    known = _cpuinfo()
    return known.get("model name") or known.get("Model") or platform.processor() or platform.machine()


def flags() -> frozenset[str]:
    """Return the CPU's instruction sets as Linux lists them. Empty on other systems."""
    known = _cpuinfo()
    return frozenset((known.get("flags") or known.get("Features") or "").split())


def decisive_flags() -> list[str]:
    """Return those of `flags` that decide which kernels run, in the order of `DECISIVE_FLAGS`."""
    return [flag for flag in DECISIVE_FLAGS if flag in flags()]


def bf16_instructions() -> str | None:
    """Return the best bf16 instruction set of this CPU: amx_bf16 (tiles), avx512_bf16 (vectors) or None."""
    return next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags()), None)


def mkl_is_slow() -> bool:
    """Return whether oneDNN multiplies float32 matrices faster than MKL on this CPU.

    It does on AMD CPUs, where MKL runs its AVX2 kernels (DeiT-S shapes, two Zen 4 cores: MKL 186 GFLOP/s, oneDNN 213).
    """
    return _cpuinfo().get("vendor_id") == "AuthenticAMD"


@functools.cache
def onednn_has_bf16() -> bool:
    """Return whether oneDNN has bf16 matrix products for this CPU. A CPU with at most AVX2 has none."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
