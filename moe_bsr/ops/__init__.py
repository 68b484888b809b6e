"""Kernels behind one door: what is fast on some machine, each beside a plain PyTorch reference.

Every operation has one public function; it takes the fast way where there is one for the device and the types,
and the reference of the same signature elsewhere. The reference is the oracle of the tests, and what is exported:

    with ops.reference():
        program = torch.export.export(model, ...)

torch's private operators are named here and nowhere above.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_reference = False


def is_reference() -> bool:
    """Whether the plain references are to be used everywhere."""
    return _reference


@contextmanager
def reference() -> Iterator[None]:
    """Within, every operation is computed by its plain PyTorch reference, forward and backward.

    For the whole process: not to be entered while another thread trains.
    """
    global _reference
    before, _reference = _reference, True
    try:
        yield
    finally:
        _reference = before
