"""What kind of CPU this is, as far as that decides which kernel is the fastest.

Read, not timed: the same CPU always chooses the same kernels, and so computes the same bits.
"""

import contextlib
import functools
import platform
from pathlib import Path

import torch

# What decides about kernels and their rounding, in x86 and in Arm words.
DECISIVE_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "i8mm", "bf16", "sve", "sve2"),
)


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first CPU of /proc/cpuinfo by field name; empty where there is no such file (not Linux)."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return fields


def name() -> str:
    """The CPU's model, or at least its architecture."""
    known = _cpuinfo()
    return known.get("model name") or known.get("Model") or platform.processor() or platform.machine()


def flags() -> frozenset[str]:
    """The instruction sets that Linux says the CPU has; empty elsewhere."""
    known = _cpuinfo()
    return frozenset((known.get("flags") or known.get("Features") or "").split())


def decisive_flags() -> list[str]:
    """Those of `flags` that decide which kernels run."""
    return [flag for flag in DECISIVE_FLAGS if flag in flags()]


def bf16_instructions() -> str | None:
    """The best there are: amx_bf16 (matrix tiles), avx512_bf16 (vectors) or none."""
    return next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags()), None)


def mkl_is_slow() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL, which serves CPUs of other makers with its AVX2
    kernels (DeiT-S shapes, two Zen 4 cores: 186 against 213 GFLOP/s)."""
    return _cpuinfo().get("vendor_id") == "AuthenticAMD"


@functools.cache
def onednn_has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 here at all: not on CPUs that end at AVX2."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
