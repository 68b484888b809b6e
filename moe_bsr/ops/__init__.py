"""Fast kernels, each with a plain PyTorch reference implementation.

Every operation has one public function. It uses the fast kernel if there is one for the device and the dtypes, and
otherwise the reference, which has the same signature. Tests compare kernels with the reference, and exports use it:

    with ops.reference():
        program = torch.export.export(model, ...)

Calls of torch's private operators belong in this folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_reference = False


def is_reference() -> bool:
    """Return whether every operation must use its reference."""
    return _reference


@contextmanager
def reference() -> Iterator[None]:
    """Context in which every operation uses its plain PyTorch reference, forward and backward.

    It applies to the whole process: do not enter it while another thread trains.
    """
    global _reference
    before, _reference = _reference, True
    try:
        yield
    finally:
        _reference = before
