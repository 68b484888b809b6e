"""Silence the library behind torch's profiler."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_kineto() -> Iterator[None]:
    """Context without stderr. The library writes warnings about absent GPUs directly to the file descriptor."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
