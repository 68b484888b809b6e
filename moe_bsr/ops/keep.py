"""Tell a storage which activations an operation saves for its backward pass, and which can be recomputed.

An operation reports the kind of each activation it saves (`keep`), and from which other activation its result can be
recomputed (`norm_derived`, `product_derived`). The active `Keeper`, which belongs to a storage, uses this to decide
what to save. For example, the result of a norm need not be saved for the next linear layer if the norm's input is.
Without a keeper nothing changes: autograd saves every tensor as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

NORM_INPUTS = "norm inputs"
LINEAR_INPUTS = "linear inputs"
QUERIES_KEYS_VALUES = "queries, keys, values"
KEYS_VALUES = "keys, values"
ATTENTION_OUTPUTS = "attention outputs"
ACTIVATION_INPUTS = "activation inputs"
KINDS = (NORM_INPUTS, LINEAR_INPUTS, QUERIES_KEYS_VALUES, KEYS_VALUES, ATTENTION_OUTPUTS, ACTIVATION_INPUTS)


class Keeper(Protocol):
    """Receiver of these reports; `model/storage/by_kind.py` implements it.

    Attributes:
        reruns_products: recompute the results of linear layers in the backward pass instead of saving them.
    """

    reruns_products: bool

    def keep(self, kind: str, x: Tensor) -> None: ...

    def keep_alike(self, kind: str, parts: list[Tensor]) -> None: ...

    def derive(self, result: Tensor, source: Tensor, again: Callable[[Tensor], Tensor]) -> None: ...

    def is_coarse(self, kind: str) -> bool: ...


_keeper: ContextVar[Keeper | None] = ContextVar("keeper", default=None)


@contextmanager
def keeping(keeper: Keeper) -> Iterator[None]:
    """Context in which operations report to `keeper`."""
    token = _keeper.set(keeper)
    try:
        yield
    finally:
        _keeper.reset(token)


def keep(kind: str, x: Tensor) -> Tensor:
    """Report that x is about to be saved for a backward pass, and return x."""
    if (keeper := _keeper.get()) is not None:
        keeper.keep(kind, x)
    return x


def keep_alike(kind: str, parts: list[Tensor]) -> list[Tensor]:
    """Report tensors (r, F) that must be rounded alike, such as the hidden values of all experts; return them.

    The gradient of a gate compares experts by these values. If each expert's values were rounded with a scale of their
    own, equal experts would appear to differ.
    """
    if parts and (keeper := _keeper.get()) is not None:
        keeper.keep_alike(kind, parts)
    return parts


def norm_derived(result: Tensor, source: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    """Report that `result` equals `again(source)` to the bit and is cheap to recompute; return it.

    `source` has been reported with `keep`.
    """
    if (keeper := _keeper.get()) is not None:
        keeper.derive(result, source, again)
    return result


def product_derived(result: Tensor, source: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    """Like `norm_derived`, for the result of a matrix product, which costs more to recompute."""
    if (keeper := _keeper.get()) is not None and keeper.reruns_products:
        keeper.derive(result, source, again)
    return result


def reruns_products() -> bool:
    """Return whether the active keeper wants matrix products recomputed instead of their results saved."""
    return (keeper := _keeper.get()) is not None and keeper.reruns_products


def is_coarse(kind: str) -> bool:
    """Return whether the active keeper changes this kind so much that values computed from the original no longer fit.

    Such values are then recomputed from the restored tensor.
    """
    return (keeper := _keeper.get()) is not None and keeper.is_coarse(kind)
