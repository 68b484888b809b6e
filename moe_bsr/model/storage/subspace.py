"""Keep the three inputs that `segments` keeps in a subspace of their channels: as coefficients C and a basis Q.

A matrix A of all tokens of a micro-batch, (rows, D), is kept as C = A Q, (rows, r), and comes back as C Q^T. Queries,
keys, values and hidden values are computed again from that. LoRAct and LANCE (2025) keep activations so. Here the basis
is found anew for each matrix, from no random draw: the largest channels of A^T A, and from there two steps of
subspace iteration, after which the gradients are as good as with the best basis. The first token of each image is kept
as it is: where it is the class token, most of the gradient comes through it.

The forward pass is exact. Gradients are not, and those of `segments_int8` are better for less: it is here to be
compared with.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from moe_bsr.config import require
from moe_bsr.model.storage import STORAGES, Storage
from moe_bsr.model.storage.by_kind import Table, run_by_kind
from moe_bsr.ops.keep import ATTENTION_OUTPUTS, LINEAR_INPUTS, NORM_INPUTS, QUERIES_KEYS_VALUES

STEPS = 2


@dataclass(frozen=True)
class SubspaceOptions:
    """rank: dimensions of the subspace, as a share of the width."""

    rank: float = 0.25

    def __post_init__(self) -> None:
        require(0 < self.rank <= 1, "storage.rank", self.rank, "a share of the width, above 0 and at most 1")


class InSubspace:
    """(..., N, D) as coefficients (rows, r) and a basis (D, r), and the first of each N tokens.

    What would take no less room so, such as the class tokens alone, stays as it is.
    """

    def __init__(self, x: Tensor, rank: float) -> None:
        self.shape, width, first = x.shape, x.shape[-1], x[..., :1, :]
        r, rows = math.ceil(rank * width), x.numel() // width
        self.whole = x if r * (rows + width) + first.numel() >= x.numel() else None
        if self.whole is None:
            with torch.autocast(x.device.type, enabled=False):
                matrix = x.flatten(0, -2).float()
                basis = leading_basis(matrix.t() @ matrix, r)
                self.coefficients, self.basis = (matrix @ basis).to(x.dtype), basis.to(x.dtype)
            self.first = first.clone()

    def restore(self) -> Tensor:
        if self.whole is not None:
            return self.whole
        x = (self.coefficients @ self.basis.t()).view(self.shape)
        x[..., :1, :] = self.first
        return x


def leading_basis(gram: Tensor, r: int) -> Tensor:
    """Nearly the r leading eigenvectors of (D, D) A^T A, in float32: orthonormal columns, (D, r)."""
    basis = gram[:, gram.diagonal().topk(r).indices]
    for _ in range(STEPS):
        basis = gram @ torch.linalg.qr(basis).Q
    return torch.linalg.qr(basis).Q


@lru_cache
def _table(options: SubspaceOptions) -> Table:
    codec = partial(InSubspace, rank=options.rank)
    inputs = dict.fromkeys((NORM_INPUTS, ATTENTION_OUTPUTS, LINEAR_INPUTS), codec)
    return Table(inputs, reruns_products=True, coarse=frozenset({QUERIES_KEYS_VALUES}))


def _run(forward, tokens, parameters, options):
    return run_by_kind(_table(options), forward, tokens, parameters)


STORAGES.register("subspace", SubspaceOptions)(Storage(_run, coarse=True))
