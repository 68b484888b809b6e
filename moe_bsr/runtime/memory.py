"""How much memory there is for a run, and what it looks like when it was too little."""

import contextlib
import errno
import re
import resource
import textwrap
from pathlib import Path

import torch

REMEDY = (
    "lower train.batch_size, raise train.grad_accumulation_steps, or let storage keep less for the backward pass "
    "(storage: recompute or int8)"
)

CGROUP = Path("/sys/fs/cgroup")

# Allocators and oneDNN have no exception of their own for it.
WORDS = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_?alloc|alloc_failed|"
    r"could not (create|execute) a (primitive|memory)|failed to allocate|unable to allocate",
    re.IGNORECASE,
)


def is_short(error: BaseException) -> bool:
    """Whether this exception says that memory did not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and WORDS.search(str(error)) is not None


def described(error: BaseException) -> str:
    """The exception in one short line."""
    said = re.sub(r"\[enforce fail at [^]]*\] \S+ == 0\. ", "", str(error))
    return textwrap.shorten(said, 160, placeholder=" ...") or type(error).__name__


def available(device: torch.device) -> tuple[int, str] | None:
    """Bytes that this process may still take on a device, and what sets that limit; None if it is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused, str(device)
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_of_machine(), _of_cgroup(), _of_process()) if limit is not None]
    return min(limits) if limits else None


def _of_machine() -> tuple[int, str] | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024, "this machine"
    return None


def _of_cgroup() -> tuple[int, str] | None:
    """Of version 2 or 1; pages of files count as available, for they can be given back."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            free = int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text())
            statistics = dict(
                line.split() for line in (CGROUP / used).with_name("memory.stat").read_text().splitlines()
            )
            return max(0, free + int(statistics.get(cached, 0))), "this container"
    return None


def _of_process() -> tuple[int, str] | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return max(0, limit - pages * resource.getpagesize()), "this process (ulimit -v)"
    return None


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


MOUNTS = Path("/proc/self/mounts")


def holds(folder: str) -> bool:
    """Whether the files of a folder are in memory (tmpfs); False where the system does not tell."""
    within = [Path(folder).resolve(), *Path(folder).resolve().parents]
    with contextlib.suppress(OSError):
        mounted = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()]
        found = [(len(place), kind) for place, kind in mounted if Path(place) in within]
        return bool(found) and max(found)[1] in ("tmpfs", "ramfs")
    return False
