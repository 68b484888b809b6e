"""Write the activations that `exact` saves to a temporary file, and read them in the backward pass.

Gradients are the same to the bit. Each run of a block has its own unnamed file, which disappears when nothing needs it
or when the process ends in any way. The file is read and written, not memory-mapped: a full disk is then an error
instead of a signal that kills the process, and data that was read takes memory only while it is used. Statistics,
indices and weights stay in memory. The speed depends on the disk and on how much of the file the system can cache.
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
    """Options of offload.

    Attributes:
        folder: where the files are; null for the system's temporary folder, which TMPDIR names.
    """

    folder: str | None = None

    @property
    def place(self) -> str:
        return self.folder or tempfile.gettempdir()


class InFile:
    """A tensor that was appended to a file. `restore()` reads it again each time.

    Raises:
        OSError: the disk is full, or the file cannot be written or read.
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
    """Replacement of `InFile` for tensors without values. It counts the bytes that would be written."""

    def __init__(self, x: Tensor, count: Callable[[int], None]) -> None:
        self.like = x.shape, x.dtype, x.device
        count(x.nbytes)

    def restore(self) -> Tensor:
        shape, dtype, device = self.like
        return torch.empty(shape, dtype=dtype, device=device)


_count: ContextVar[Callable[[int], None] | None] = ContextVar("count of bytes", default=None)


@contextmanager
def counting(count: Callable[[int], None]) -> Iterator[None]:
    """Context for tensors without values: nothing is written, and `count` is called with the bytes that would be."""
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.view(-1).view(torch.uint8).numpy())


def _named(error: OSError, folder: str) -> OSError:
    """Return the error with the name of the folder, because the file has none."""
    return OSError(error.errno, error.strerror, f"storage.folder {folder}")


def _run(forward, tokens, parameters, options: OffloadOptions):
    device, folder, count = tokens.x.device.type, options.place, _count.get()
    require(device == "cpu", "storage", "offload", f"works only on a CPU, not on {device}; take recompute or int8")
    require(os.path.isdir(folder), "storage.folder", folder, "must be an existing folder with room for the activations")
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
