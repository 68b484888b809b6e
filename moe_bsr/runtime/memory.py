"""Find out how much memory a run may take, and recognize errors that mean out of memory."""

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

# Allocators and oneDNN raise a plain RuntimeError when memory runs out. It is recognized by its text.
WORDS = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_?alloc|alloc_failed|"
    r"could not (create|execute) a (primitive|memory)|failed to allocate|unable to allocate",
    re.IGNORECASE,
)


def is_short(error: BaseException) -> bool:
    """Return whether this exception means out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and WORDS.search(str(error)) is not None


def described(error: BaseException) -> str:
    """Return the exception's message in one line of at most 160 characters."""
    said = re.sub(r"\[enforce fail at [^]]*\] \S+ == 0\. ", "", str(error))
    return textwrap.shorten(said, 160, placeholder=" ...") or type(error).__name__


def available(device: torch.device) -> tuple[int, str] | None:
    """Return the bytes that this process may still allocate on a device, and what sets the limit. None if unknown."""
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
    """Read the limit of the cgroup (version 2 or 1). Inactive page cache counts as free, since it can be reclaimed."""
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
    """Return the resident memory of this process in bytes, 0 if the system does not tell."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


MOUNTS = Path("/proc/self/mounts")


def holds(folder: str) -> bool:
    """Return whether a folder's files are held in memory (tmpfs or ramfs). False if the system does not tell."""
    within = [Path(folder).resolve(), *Path(folder).resolve().parents]
    with contextlib.suppress(OSError):
        mounted = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()]
        found = [(len(place), kind) for place, kind in mounted if Path(place) in within]
        return bool(found) and max(found)[1] in ("tmpfs", "ramfs")
    return False
