"""What operations keep for their backward pass, by kind, and what they can compute again from it.

An operation says of each activation that it saves what it is (`keep`), and of its result from which other
activation it follows (`derived`). Whoever decides what is saved, a `Keeper`, hears it: the norm's result need not be
saved for the linear layer behind it if the norm's input is. Without a keeper nothing changes: autograd saves all.
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
    """Attributes:
    reruns_products: whether results of linear layers are computed again instead of being saved.
    """

    reruns_products: bool

    def keep(self, kind: str, x: Tensor) -> None: ...

    def keep_alike(self, kind: str, parts: list[Tensor]) -> None: ...

    def derive(self, result: Tensor, source: Tensor, again: Callable[[Tensor], Tensor]) -> None: ...

    def is_coarse(self, kind: str) -> bool: ...


_keeper: ContextVar[Keeper | None] = ContextVar("keeper", default=None)


@contextmanager
def keeping(keeper: Keeper) -> Iterator[None]:
    """Within, `keeper` hears of everything that is kept."""
    token = _keeper.set(keeper)
    try:
        yield
    finally:
        _keeper.reset(token)


def keep(kind: str, x: Tensor) -> Tensor:
    """x, which is about to be saved for a backward pass."""
    if (keeper := _keeper.get()) is not None:
        keeper.keep(kind, x)
    return x


def keep_alike(kind: str, parts: list[Tensor]) -> list[Tensor]:
    """(r, F) tensors about to be saved that are rows of one: all experts' hidden values.

    For whoever rounds what is saved: a gate's gradient tells experts apart by these values alone, and where each
    expert's were rounded in its own way, equal experts would differ.
    """
    if parts and (keeper := _keeper.get()) is not None:
        keeper.keep_alike(kind, parts)
    return parts


def norm_derived(result: Tensor, source: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    """`result`, which is `again(source)` to the bit; cheap to repeat. `source` is kept."""
    if (keeper := _keeper.get()) is not None:
        keeper.derive(result, source, again)
    return result


def product_derived(result: Tensor, source: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    """The same of a matrix product."""
    if (keeper := _keeper.get()) is not None and keeper.reruns_products:
        keeper.derive(result, source, again)
    return result


def reruns_products() -> bool:
    """Whether whoever keeps would rather have products computed again than their results kept."""
    return (keeper := _keeper.get()) is not None and keeper.reruns_products


def is_coarse(kind: str) -> bool:
    """Whether this kind comes back so much changed that what was computed from it does not fit it any more."""
    return (keeper := _keeper.get()) is not None and keeper.is_coarse(kind)
