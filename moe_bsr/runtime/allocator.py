"""The C library's memory allocator, set for training. It belongs to the process, so only programs set it.

The command line calls both functions; the library never does. A program of your own that trains gains the
same from `moe_bsr.runtime.device.tune_process()` at its start and GLIBC_TUNABLES=glibc.malloc.tcache_count=0
in its environment. Without them results are the same, slower and with more memory. This module imports
nothing heavy: `start_again` comes before everything else.
"""

import contextlib
import ctypes
import os
import sys

SETTING = "glibc.malloc.tcache_count=0"


def start_again() -> None:
    """Run this program again with a setting that glibc reads only at a program's start.

    torch asks glibc for aligned blocks, and glibc up to 2.37 cannot put one where a block of the same size was
    freed while a small remainder beside it lies in a thread's cache. The heap then grows with every update to
    several times what is ever alive (MoE-BSR of the quickstart: 0.6 GB alive, 3.3 GB resident after 150
    updates; without these caches 1.3 GB, at the same speed).

    Returns if the setting is there, or anyone has chosen another.
    """
    known = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "tcache_count" not in known:
        os.environ["GLIBC_TUNABLES"] = f"{known}:{SETTING}".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> None:
    """Stop glibc from giving freed memory back to the kernel at every large tensor.

    By default each large allocation is a fresh mapping whose pages fault in one by one, which makes
    elementwise kernels 4 to 5 times slower. The price is that resident memory stays at its peak.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            m_trim_threshold, m_mmap_max, m_mxfast = -1, -4, 1
            libc.mallopt(m_mxfast, 0)  # remainders between aligned blocks join them again; see `start_again`
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)
