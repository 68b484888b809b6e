"""What kind of CPU this is, as far as that decides which kernel is the fastest.

Read, not timed: the same CPU always chooses the same kernels, and so computes the same bits.
"""

import contextlib
import functools
from pathlib import Path

import torch


@functools.cache
def words() -> frozenset[str]:
    """All that Linux says of the CPU, word by word; nothing elsewhere."""
    with contextlib.suppress(OSError):
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    return frozenset()


def bf16_instructions() -> str | None:
    """The best there are: amx_bf16 (matrix tiles), avx512_bf16 (vectors) or none."""
    return next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in words()), None)


def mkl_is_slow() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL, which serves CPUs of other makers with its AVX2
    kernels (DeiT-S shapes, two Zen 4 cores: 186 against 213 GFLOP/s)."""
    return "AuthenticAMD" in words()


@functools.cache
def onednn_has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 here at all: not on CPUs that end at AVX2."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
