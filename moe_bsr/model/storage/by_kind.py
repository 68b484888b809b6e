"""Storages given by a table that has a codec for each kind of activation.

The forward pass is exact; only the tensors of the backward pass may differ. Parameters, indices and per-token
statistics, which operations save as columns (..., 1), are saved as they are. A tensor that several operations save is
packed once. A tensor that can be recomputed from a saved one (`moe_bsr.ops.keep`) is not saved.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from moe_bsr.model.storage.codecs import Packed
from moe_bsr.ops.keep import keeping

NARROW = 16  # tensors with a smaller last dimension are not packed

Codec = Callable[[Tensor], Packed]


@dataclass(frozen=True, slots=True)
class Table:
    """How a storage saves each kind of activation.

    Attributes:
        codecs: codec by kind (`moe_bsr.ops.keep`); a kind without a codec is saved as it is.
        other: codec for tensors that torch's own operations save; None to save them as they are.
        reruns: recompute the results of norms in the backward pass instead of saving them.
        reruns_products: the same for the results of linear layers.
        coarse: kinds whose codec changes values much, see `moe_bsr.ops.keep.is_coarse`.
    """

    codecs: Mapping[str, Codec] = field(default_factory=dict)
    other: Codec | None = None
    reruns: bool = True
    reruns_products: bool = False
    coarse: frozenset[str] = frozenset()


class AsItIs:
    """A tensor saved as it is, but detached: an operation's own output would otherwise keep its graph alive forever.

    Autograd does not check tensors that are saved by hooks, so `restore` makes its check for changes in place.
    """

    def __init__(self, x: Tensor) -> None:
        self.kept = x if isinstance(x, nn.Parameter) else x.detach()
        self.version = x._version

    def restore(self) -> Tensor:
        if self.kept._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.kept.shape)} that the backward pass needs was changed in place after "
                "the forward pass, for example by optimizer.step(): run the forward pass again after the change"
            )
        return self.kept


@dataclass(slots=True)
class View:
    """A saved tensor, or a part of it, in the shape in which an operation saved it.

    Attributes:
        part: (strides, offset) within the saved tensor; None if it is the whole tensor.
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
    """The result of an operation, which `restore` computes again from the saved input."""

    again: Callable[[Tensor], Tensor]
    source: View

    def restore(self) -> Tensor:
        with torch.no_grad():
            return self.again(self.source.restore())


class _Keeper:
    """Tensors saved in one run of a block, found by their address.

    Addresses are reused, so a weak reference tells whether the tensor at an address still exists.
    """

    def __init__(self, table: Table, parameters: list[nn.Parameter]) -> None:
        self.table, self.reruns_products = table, table.reruns_products
        self._weights = frozenset(
            shape for p in parameters if p.ndim >= 2 for shape in (tuple(p.shape), tuple(p.transpose(-2, -1).shape))
        )
        self._kept: dict[tuple, tuple[StorageWeakRef, Packed]] = {}
        self._results: dict[tuple, tuple[StorageWeakRef, Again]] = {}  # by `_memory`, so that views are found too

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
        """Return how a tensor is already saved or can be computed again; None if neither."""
        kept, result = self._kept.get(_key(x)), self._results.get(_memory(x))
        if kept is not None and not kept[0].expired():
            return View(kept[1], x.shape)
        if result is not None and not result[0].expired():
            return View(result[1], x.shape, None if _is_whole(x) else (x.stride(), x.storage_offset()))
        return None


def _key(x: Tensor) -> tuple:
    """Return a key that is equal for contiguous views of the same values. Other views differ by shape and strides."""
    return x.data_ptr(), x.numel() if x.is_contiguous() else (x.shape, x.stride()), x.dtype, x._version


def _memory(x: Tensor) -> tuple:
    """Return a key that is equal for all views of one tensor."""
    return x.data_ptr() - x.storage_offset() * x.element_size(), x.dtype, x._version


def _is_whole(x: Tensor) -> bool:
    return x.is_contiguous() and x.numel() * x.element_size() == x.untyped_storage().nbytes()


def packable(x: Tensor, weights: frozenset[tuple[int, ...]] = frozenset()) -> bool:
    """Return whether a tensor is an activation: floating point, no parameter or view of one, and not narrow.

    Args:
        weights: shapes of the block's weights. Autocast's copies of weights can be recognized only by their shape.
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
    """Run `forward(tokens)`, saving its activations as the table says."""
    keeper = _Keeper(table, parameters)
    with saved_tensors_hooks(keeper.pack, View.restore), keeping(keeper):
        result = forward(tokens)
    keeper.clear()  # autograd keeps a reference to `keeper.pack`
    return result
