"""Factored weights: a linear layer as two thinner ones that train, W (out, in) ~ L (out, rank) R (rank, in).

This is the weight part of WASI (ICLR 2026). Its text gives no rule by which an update of W becomes one of L and R, and
its code stores W and its gradient in full and factors it anew in each forward pass. Here L and R are ordinary
parameters: W, its gradient and its moments do not exist, and any optimizer, clipping and resuming work.

Products cost less than those of W if rank < out x in / (out + in), which is 0.75 to 0.8 of the smaller side for most
layers of a ViT and 0.5 for `attn.proj`. At such ranks the network is no longer the pretrained one (docs/log.md). The
two factors save `rank` values per token more than W. With `freeze_right` only L trains, and the layer's input need not
be saved.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moe_bsr.config import require
from moe_bsr.model.adapters import ADAPTERS, Adapter
from moe_bsr.model.adapters.wrapped import Wrapped, checked, wrap
from moe_bsr.model.layers import Linear
from moe_bsr.ops.linear import activated_linear, linear


@dataclass(frozen=True)
class FactoredOptions:
    """Options of factored weights.

    Attributes:
        rank: share of the weight's smaller side. 1 is exact.
        layers: names of the block's linear layers that are factored; by default those of the FFN, as the authors'.
        freeze_right: train only L.
    """

    rank: float = 0.75
    layers: list[str] = field(default_factory=lambda: ["mlp.fc1", "mlp.fc2"])
    freeze_right: bool = False

    def __post_init__(self) -> None:
        require(0 < self.rank <= 1, "adapter.rank", self.rank, "a share of the smaller side, above 0 and at most 1")
        object.__setattr__(self, "layers", checked(self.layers))


class FactoredLinear(Wrapped):
    """x R^T L^T + bias. L R is the best approximation of the pretrained weight of this rank (by singular values)."""

    def __init__(self, base: nn.Linear, options: FactoredOptions) -> None:
        super().__init__()
        weight, rank = base.weight.detach(), math.ceil(options.rank * min(base.weight.shape))
        left, scales, right = torch.linalg.svd(weight.float(), full_matrices=False)
        roots = scales[:rank].sqrt()  # both factors get the same scale, and so steps of the same size
        self.left = nn.Parameter((left[:, :rank] * roots).contiguous())
        self.right = nn.Parameter((roots[:, None] * right[:rank]).contiguous(), requires_grad=not options.freeze_right)
        self.bias = base.bias
        self.new = [self.left, self.right]

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.right, None), self.left, self.bias)

    def activated(self, act: nn.Module, x: Tensor, needs_output: bool = True) -> Tensor:
        """Compute the layer for act(x), saving x and `rank` values per token for the backward pass."""
        return linear(activated_linear(act, x, self.right, None), self.left, self.bias)

    @torch.no_grad()
    def merged(self) -> Linear:
        """Return a layer with the weight L R."""
        weight = self.left @ self.right
        layer = nn.utils.skip_init(Linear, weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        layer.weight.data, layer.bias = weight, self.bias
        return layer


def attach(block: nn.Module, options: FactoredOptions, seed: tuple) -> list[nn.Parameter]:
    return wrap(block, options.layers, lambda base, path: FactoredLinear(base, options))


def merged_weight(options: FactoredOptions, weight: Tensor, saved: Mapping[str, Tensor]) -> Tensor:
    return saved["left"] @ saved["right"]


ADAPTERS.register("factored", FactoredOptions)(Adapter(attach, merged_weight))
