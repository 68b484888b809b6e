"""Storages as tables: for each kind of activation a codec, or the tensor as it is.

The forward pass is exact; only what the backward pass finds may be changed. Parameters, indices and small per-token
statistics stay as they are (an operation saves these as columns, (..., 1)), and a tensor that several operations keep
is packed once. What follows from a kept tensor (`moe_bsr.ops.keep`) is not kept but computed from it again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from moe_bsr.model.storage.codecs import Packed
from moe_bsr.ops.keep import keeping

NARROW = 16  # values a token; what is narrower stays as it is

Codec = Callable[[Tensor], Packed]


@dataclass(frozen=True, slots=True)
class Table:
    """Attributes:
    codecs: by kind (`moe_bsr.ops.keep`); a kind without one is kept as it is.
    other: the codec of what operations keep that are not ours.
    reruns: whether results of norms are computed again from what is kept. reruns_products: of linear layers too.
    coarse: kinds whose codec changes values much.
    """

    codecs: Mapping[str, Codec] = field(default_factory=dict)
    other: Codec | None = None
    reruns: bool = True
    reruns_products: bool = False
    coarse: frozenset[str] = frozenset()


class AsItIs:
    """A tensor without its graph: what an operation returns would otherwise hold itself alive."""

    def __init__(self, x: Tensor) -> None:
        self.kept = x if isinstance(x, nn.Parameter) else x.detach()

    def restore(self) -> Tensor:
        return self.kept


@dataclass(slots=True)
class View:
    """What is kept, in the shape in which an operation had it.

    Attributes:
        part: (strides, offset) of a part of what is kept; None of the whole.
    """

    kept: Packed
    shape: torch.Size
    part: tuple[tuple[int, ...], int] | None = None

    def restore(self) -> Tensor:
        whole = self.kept.restore()
        if self.part is not None:
            return whole.as_strided(self.shape, *self.part)
        return whole if whole.shape == self.shape else whole.view(self.shape)


@dataclass(slots=True)
class Again:
    """The result of an operation, to be computed from what is kept of its input."""

    again: Callable[[Tensor], Tensor]
    source: View

    def restore(self) -> Tensor:
        with torch.no_grad():
            return self.again(self.source.restore())


class _Keeper:
    """What one run of a block keeps. Addresses are used again: a reference tells whether the tensor still lives."""

    def __init__(self, table: Table, parameters: list[nn.Parameter]) -> None:
        self.table, self.reruns_products = table, table.reruns_products
        self._weights = frozenset(
            shape for p in parameters if p.ndim >= 2 for shape in (tuple(p.shape), tuple(p.transpose(-2, -1).shape))
        )
        self._kept: dict[tuple, tuple[StorageWeakRef, Packed]] = {}
        self._results: dict[tuple, tuple[StorageWeakRef, Again]] = {}  # by their whole memory

    def keep(self, kind: str, x: Tensor) -> None:
        self.view(x, self.table.codecs.get(kind))

    def keep_alike(self, kind: str, parts: list[Tensor]) -> None:
        alike = getattr(self.table.codecs.get(kind), "alike", None)
        if alike is not None and packable(parts[0], self._weights):
            for part, packed in zip(parts, alike([part.detach() for part in parts]), strict=True):
                self._kept[_key(part)] = StorageWeakRef(part.untyped_storage()), packed

    def derive(self, result: Tensor, source: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        if self.table.reruns and _is_whole(result) and (view := self._found(source)) is not None:
            self._results[_memory(result)] = StorageWeakRef(result.untyped_storage()), Again(again, view)

    def is_coarse(self, kind: str) -> bool:
        return kind in self.table.coarse

    def pack(self, x: Tensor) -> View:
        return self.view(x, self.table.other)

    def clear(self) -> None:
        self._kept.clear()
        self._results.clear()

    def view(self, x: Tensor, codec: Codec | None) -> View:
        if (found := self._found(x)) is not None:
            return found
        kept = AsItIs(x) if codec is None or not packable(x, self._weights) else codec(x.detach())
        self._kept[_key(x)] = StorageWeakRef(x.untyped_storage()), kept
        return View(kept, x.shape)

    def _found(self, x: Tensor) -> View | None:
        """What is kept of a tensor already, or how it is computed again."""
        kept, result = self._kept.get(_key(x)), self._results.get(_memory(x))
        if kept is not None and not kept[0].expired():
            return View(kept[1], x.shape)
        if result is not None and not result[0].expired():
            return View(result[1], x.shape, None if _is_whole(x) else (x.stride(), x.storage_offset()))
        return None


def _key(x: Tensor) -> tuple:
    """The same values in another shape are the same values; strided ones are told apart by their strides."""
    return x.data_ptr(), x.numel() if x.is_contiguous() else (x.shape, x.stride()), x.dtype, x._version


def _memory(x: Tensor) -> tuple:
    """Of all views of one tensor."""
    return x.data_ptr() - x.storage_offset() * x.element_size(), x.dtype, x._version


def _is_whole(x: Tensor) -> bool:
    return x.is_contiguous() and x.numel() * x.element_size() == x.untyped_storage().nbytes()


def packable(x: Tensor, weights: frozenset[tuple[int, ...]] = frozenset()) -> bool:
    """Activations: floating, no parameter or view of one, and wider than per-token statistics and gates.

    Args:
        weights: shapes of the block's own: autocast's copies of them are known by nothing else.
    """
    source = x if x._base is None else x._base
    return (
        x.is_floating_point()
        and not isinstance(source, nn.Parameter)
        and x.ndim >= 2
        and x.shape[-1] >= NARROW
        and tuple(x.shape) not in weights
    )


def run_by_kind(table: Table, forward, tokens, parameters: list[nn.Parameter], options=None):
    """`forward(tokens)`, whose activations are kept as the table says."""
    keeper = _Keeper(table, parameters)
    with saved_tensors_hooks(keeper.pack, View.restore), keeping(keeper):
        result = forward(tokens)
    keeper.clear()  # autograd holds on to `pack`
    return result
