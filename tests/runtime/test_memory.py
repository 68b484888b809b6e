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


def test_a_limit_of_the_container_counts(monkeypatch, tmp_path):
    for name, text in (("max", "1000000"), ("current", "900000"), ("stat", "anon 5\ninactive_file 50000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available(CPU) == (150_000, "this container")
    (tmp_path / "memory.max").write_text("max")
    assert memory.available(CPU)[1] != "this container"
