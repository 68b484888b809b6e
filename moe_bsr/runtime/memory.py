"""Find out how much memory a run may take, and recognize errors that mean out of memory."""

import contextlib
import errno
import re
import resource
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch

REMEDY = (
    "lower train.batch_size, raise train.grad_accumulation_steps, or let storage keep less for the backward pass "
    "(storage: recompute or int8)"
)

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

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
    limits = [limit for limit in (_of_machine(), *_of_cgroups(), _of_process()) if limit is not None]
    return min(limits) if limits else None


def _of_machine() -> tuple[int, str] | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024, "this machine"
    return None


def _of_cgroups() -> Iterator[tuple[int, str]]:
    """Yield what the limits of this process's cgroup and of its parents leave free (versions 2 and 1).

    In a container without a cgroup namespace, only the root is visible, and it is the container's cgroup.
    """
    with contextlib.suppress(OSError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = CGROUP / "memory" if controllers else CGROUP
            for part in (Path(path), *Path(path).parents):
                if (free := _of_cgroup(root / part.relative_to("/"), version=1 if controllers else 2)) is not None:
                    yield free, f"the cgroup {part}" if part.name else "this container"


def _of_cgroup(folder: Path, version: int) -> int | None:
    """Return the free bytes of one cgroup. Inactive page cache counts as free, since it can be reclaimed."""
    limit, used, cached = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        free = int((folder / limit).read_text()) - int((folder / used).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, free + int(statistics.get(cached, 0)))
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
