"""Write what `exact` keeps to a temporary file, and read it in the backward pass: the same gradients to the bit.

Each run of a block has a file of its own, which has no name: it is gone when nothing needs it any more, and when the
process ends, however that happens. It is written and read, not mapped: a full disk is an error then and no signal that
kills the process, and what is read counts as memory only while it is used. Statistics, indices and weights stay in
memory. How fast it is depends on the disk, and on how much of the file the system can hold in unused memory.
"""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import IO

import torch
from torch import Tensor

from moe_bsr.config import require
from moe_bsr.model.storage import STORAGES, Storage
from moe_bsr.model.storage.by_kind import Table, run_by_kind
from moe_bsr.ops.keep import KINDS


@dataclass(frozen=True)
class OffloadOptions:
    """folder: of the files; null: the system's for temporary ones, which TMPDIR names."""

    folder: str | None = None

    @property
    def place(self) -> str:
        return self.folder or tempfile.gettempdir()


class InFile:
    """A tensor written to the end of a file. `restore()` reads it anew each time.

    Raises:
        OSError: no room, or the file cannot be written or read.
    """

    def __init__(self, x: Tensor, file: IO[bytes], folder: str) -> None:
        self.file, self.folder, self.shape, self.dtype = file, folder, x.shape, x.dtype
        rest = _bytes(x.contiguous())
        try:
            self.start = file.seek(0, os.SEEK_END)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise _named(error, folder) from error

    def restore(self) -> Tensor:
        x = torch.empty(self.shape, dtype=self.dtype)
        rest = _bytes(x)
        try:
            self.file.seek(self.start)
            while rest:
                count = self.file.readinto(rest)
                if not count:
                    raise OSError(errno.EIO, "the file has become shorter")
                rest = rest[count:]
        except OSError as error:
            raise _named(error, self.folder) from error
        return x


class Counted:
    """In place of `InFile` for tensors without values: how many bytes it would be."""

    def __init__(self, x: Tensor, count: Callable[[int], None]) -> None:
        self.like = x.shape, x.dtype, x.device
        count(x.nbytes)

    def restore(self) -> Tensor:
        shape, dtype, device = self.like
        return torch.empty(shape, dtype=dtype, device=device)


_count: ContextVar[Callable[[int], None] | None] = ContextVar("count of bytes", default=None)


@contextmanager
def counting(count: Callable[[int], None]) -> Iterator[None]:
    """Within, nothing is written, but `count` is called with the bytes that would be; for tensors without values."""
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.view(-1).view(torch.uint8).numpy())


def _named(error: OSError, folder: str) -> OSError:
    """The error with the folder in place of a file that has no name."""
    return OSError(error.errno, error.strerror, f"storage.folder {folder}")


def _run(forward, tokens, parameters, options: OffloadOptions):
    device, folder, count = tokens.x.device.type, options.place, _count.get()
    require(
        device == "cpu", "storage", "offload", f"not on {device}, where nothing is offloaded; take recompute or int8"
    )
    require(os.path.isdir(folder), "storage.folder", folder, "a folder that is there, with room for what is saved")
    if count is not None:
        return _under(partial(Counted, count=count), forward, tokens, parameters)
    try:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)
    except OSError as error:
        raise _named(error, folder) from error
    return _under(partial(InFile, file=file, folder=folder), forward, tokens, parameters)


def _under(codec, forward, tokens, parameters):
    return run_by_kind(Table(dict.fromkeys(KINDS, codec), codec), forward, tokens, parameters)


STORAGES.register("offload", OffloadOptions)(Storage(_run))
