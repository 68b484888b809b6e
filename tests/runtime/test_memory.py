"""Out-of-memory errors are recognized, and available memory respects limits of the process and container."""

import errno
import resource

import numpy as np
import pytest
import torch

from moe_bsr.runtime import memory

CPU = torch.device("cpu")


def too_much_torch() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def too_much_numpy() -> None:
    np.empty(2**60, np.uint8)


@pytest.mark.parametrize("take", [too_much_torch, too_much_numpy, lambda: b"" * 1 + bytearray(2**60)])
def test_errors_of_real_allocators_are_recognized(take):
    with pytest.raises((RuntimeError, MemoryError)) as failure:
        take()
    assert memory.is_short(failure.value)
    assert "\n" not in memory.described(failure.value) and len(memory.described(failure.value)) < 200


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_errors_about_memory_are_recognized(error, short):
    assert memory.is_short(error) is short


def test_available_memory_is_plausible():
    free, where = memory.available(CPU)
    assert 0 < free < 2**50 and where
    assert memory.available(torch.device("meta")) is None


def test_a_limit_of_the_process_counts(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**20, 2**20))
    assert memory.available(CPU) == (0, "this process (ulimit -v)")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Return a function that writes /proc/self/cgroup and the folders of cgroups, each as (limit, used, cached)."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")

    def write(membership: str, names: tuple[str, str, str], folders: dict[str, tuple]) -> None:
        (tmp_path / "membership").write_text(membership)
        for folder, (limit, used, cached) in folders.items():
            place = tmp_path / "cgroup" / folder.lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
            (place / names[0]).write_text(f"{limit}\n")
            (place / names[1]).write_text(f"{used}\n")
            (place / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")

    return write


@pytest.mark.parametrize(
    ("membership", "names", "root"),
    [("0::{}\n", V2, ""), ("12:cpu,cpuacct:/x\n9:memory:{}\n1:name=systemd:/y\n", V1, "memory")],
    ids=["version 2", "version 1"],
)
def test_the_smallest_limit_of_the_own_cgroup_and_its_parents_counts(membership, names, root, cgroups):
    none = "max" if names is V2 else 2**63 - 4096
    own, parent = f"{root}/job/step", f"{root}/job"
    cgroups(membership.format("/job/step"), names, {
        root: (500_000, 100_000, 0), parent: (1_000_000, 900_000, 50_000), own: (none, 3, 0),
        f"{root}/other": (9, 8, 0), "x": (9, 8, 0),
    })  # fmt: skip
    assert memory.available(CPU) == (150_000, "the cgroup /job")
    cgroups(membership.format("/job/step"), names, {own: (1000, 990, 0)})
    assert memory.available(CPU) == (10, "the cgroup /job/step")
    cgroups(membership.format("/docker/not/visible/here"), names, {})
    assert memory.available(CPU) == (400_000, "this container")
    cgroups(membership.format("/"), names, {root: (none, 3, 0)})
    assert memory.available(CPU)[1] == "this machine"
