"""Save the three inputs that `segments` saves, in a subspace of their channels: as coefficients C and a basis Q.

A matrix A of all tokens of a micro-batch, (rows, D), is saved as C = A Q, (rows, r), and restored as C Q^T. Queries,
keys, values and hidden values are computed again from that. LoRAct and LANCE (2025) save activations in this way. Here
a basis is computed for each matrix without random numbers: two steps of subspace iteration from the largest channels of
A^T A, after which the gradients are as good as with the best basis. The first token of each image is saved as it is: if
it is the class token, most of the gradient comes through it.

The forward pass is exact. Gradients are not; those of `segments_int8` are better and need less memory. This storage is
here for comparison.
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
    """Options of subspace.

    Attributes:
        rank: dimensions of the subspace, as a share of the width.
    """

    rank: float = 0.25

    def __post_init__(self) -> None:
        require(0 < self.rank <= 1, "storage.rank", self.rank, "a share of the width, above 0 and at most 1")


class InSubspace:
    """A tensor (..., N, D) as coefficients (rows, r), a basis (D, r), and the first of each N tokens.

    A tensor that would need as much memory in this form, such as class tokens only, stays as it is.
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
    """Approximate the r leading eigenvectors of A^T A, (D, D) float32, by orthonormal columns (D, r)."""
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
