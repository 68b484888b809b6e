"""torch's profiler without the complaints of its library."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_kineto() -> Iterator[None]:
    """The profiler's library complains on stderr about absent GPUs, past Python's own streams."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
