"""Set glibc's memory allocator up for training.

The settings hold for the whole process, so the command line makes them, and `moe_bsr.train` does not. Your own training
program gets the same effect if it calls `moe_bsr.runtime.device.tune_process()` at its start and runs with
GLIBC_TUNABLES=glibc.malloc.tcache_count=0 in its environment. Without them results are the same, but training is
slower and takes more memory. This module imports nothing heavy, because `start_again` runs before everything else.
"""

import contextlib
import ctypes
import os
import sys

SETTING = "glibc.malloc.tcache_count=0"


def start_again() -> None:
    """Restart this program (exec) with per-thread caches off, a setting that glibc reads only at program start.

    torch asks glibc for aligned blocks. glibc up to 2.37 cannot reuse a freed block of the same size while a small
    remainder beside it lies in a thread's cache. The heap then grows with every update to several times the
    allocated memory. (MoE-BSR of the quickstart: 0.6 GB allocated, 3.3 GB resident after 150 updates. Without these
    caches it is 1.3 GB resident, at the same speed.)

    Returns without a restart if GLIBC_TUNABLES already sets the cache's size, to whatever value.
    """
    known = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "tcache_count" not in known:
        os.environ["GLIBC_TUNABLES"] = f"{known}:{SETTING}".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> None:
    """Stop glibc from returning freed memory to the kernel for every large tensor.

    By default each large allocation is a new mapping whose pages fault in one by one, which makes elementwise
    kernels 4 to 5 times slower. The cost: resident memory stays at its peak.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            m_trim_threshold, m_mmap_max, m_mxfast = -1, -4, 1
            libc.mallopt(m_mxfast, 0)  # so that remainders merge with neighboring free blocks, see `start_again`
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)
