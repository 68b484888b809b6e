"""Starts a program again with the one setting of the C library that must be made before it runs.

Imported first by the tools that train or evaluate. torch asks glibc for aligned blocks, and glibc up to 2.37
cannot put one where a block of the same size was freed while a chip of the old alignment beside it lies in a
thread's cache. The heap then grows with every update to several times what is ever alive (MoE-BSR of the
quickstart: 0.6 GB alive, 3.3 GB resident after 150 updates; without these caches 1.3 GB, at the same speed).
A program of your own that calls `moe_bsr.train` wants GLIBC_TUNABLES=glibc.malloc.tcache_count=0 in its
environment.
"""

import os
import sys

SETTING = "glibc.malloc.tcache_count=0"


def start_again() -> None:
    """Returns if the setting is there, or anyone has chosen another."""
    known = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "tcache_count" not in known:
        os.environ["GLIBC_TUNABLES"] = f"{known}:{SETTING}".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
