"""Back Razor: save only the largest magnitudes of each activation (Jiang et al. 2022, "Back Razor", NeurIPS).

Inputs of norms and linear layers, queries, keys, values and the attention's output are pruned for each image. The
remaining values are saved in 16 bits, with a bitmap of their places. The input of the activation function is not
pruned, but saved in 16 bits as published, or in 8. The forward pass is exact. Gradients are not, and become smaller.

Two things differ from the public code. The attention map is not saved, but computed from the pruned queries and keys,
so that its rows sum to one. The input of the second linear layer is computed from that of the activation function, so
it is neither pruned nor saved.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

from torch import Tensor

from moe_bsr.config import require
from moe_bsr.model.storage import STORAGES, Storage
from moe_bsr.model.storage.by_kind import Table, run_by_kind
from moe_bsr.model.storage.codecs import Float16Packed, Int8Packed, Pruned
from moe_bsr.ops.keep import (
    ACTIVATION_INPUTS,
    ATTENTION_OUTPUTS,
    KEYS_VALUES,
    LINEAR_INPUTS,
    NORM_INPUTS,
    QUERIES_KEYS_VALUES,
)


@dataclass(frozen=True)
class BackRazorOptions:
    """Options of Back Razor.

    Attributes:
        sparsity: share of the values that are set to 0.
        activations: format of the activation function's input.
    """

    sparsity: float = 0.9
    activations: Literal["fp16", "int8"] = "fp16"

    def __post_init__(self) -> None:
        require(
            0 <= self.sparsity < 1, "storage.sparsity", self.sparsity, "at least 0, below 1; published: 0.8 to 0.95"
        )


def _pruned_heads(x: Tensor, sparsity: float) -> Pruned:
    """Prune queries, keys and values separately, given side by side as (B, N, 3 D) or one of them as (B, H, N, d)."""
    return Pruned(x, sparsity, parts=3 if x.ndim == 3 else 1)


@lru_cache
def _table(options: BackRazorOptions) -> Table:
    pruned = partial(Pruned, sparsity=options.sparsity)
    codecs = dict.fromkeys((NORM_INPUTS, LINEAR_INPUTS, ATTENTION_OUTPUTS), pruned)
    codecs |= {
        QUERIES_KEYS_VALUES: partial(_pruned_heads, sparsity=options.sparsity),
        KEYS_VALUES: partial(pruned, parts=2),
        ACTIVATION_INPUTS: Float16Packed if options.activations == "fp16" else Int8Packed,
    }
    return Table(codecs, reruns=False, coarse=frozenset({QUERIES_KEYS_VALUES}))


def _run(forward, tokens, parameters, options):
    return run_by_kind(_table(options), forward, tokens, parameters)


STORAGES.register("back_razor", BackRazorOptions)(Storage(_run, coarse=True))
