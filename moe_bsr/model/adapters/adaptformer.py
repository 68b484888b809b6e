"""AdaptFormer: a narrow two-layer network beside the FFN (Chen et al. 2022, arXiv 2205.13535).

x' = x + FFN(norm(x)) + scale * up(relu(down(x))). Its input is that of the norm, which the norm saves anyway; it saves
another tokens x width values. After a drop it processes only the remaining tokens. Because of its ReLU it cannot be
merged into the pretrained weights. Unlike the authors' code it has no dropout and adds no norm before the heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_bsr.config import require
from moe_bsr.model.adapters import ADAPTERS, BESIDE_FFN, Adapter
from moe_bsr.model.layers import Linear
from moe_bsr.runtime.rng import generator


@dataclass(frozen=True)
class AdaptFormerOptions:
    """Options of AdaptFormer.

    Attributes:
        width: hidden units. scale: factor of its output.
    """

    width: int = 64
    scale: float = 0.1

    def __post_init__(self) -> None:
        require(1 <= self.width <= 4096, "adapter.width", self.width, "at least 1, at most 4,096")
        allowed = "above 0, at most 1,000; at 0 the adapter has no effect and learns nothing"
        require(0 < self.scale <= 1000, "adapter.scale", self.scale, allowed)


class AdaptFormer(nn.Module):
    """The network, (B, N, D) -> (B, N, D). It outputs 0 at the start: `down` is random, `up` is zero."""

    def __init__(self, dim: int, options: AdaptFormerOptions, seed: tuple, device: torch.device) -> None:
        super().__init__()
        self.scale = options.scale
        self.down = nn.utils.skip_init(Linear, dim, options.width, device=device)
        self.up = nn.utils.skip_init(Linear, options.width, dim, device=device)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            bound = dim**-0.5  # as torch initializes linear layers
            draws = torch.rand(self.down.weight.shape, generator=generator(*seed)) * 2 * bound - bound
            self.down.weight.copy_(draws)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.down(x).relu())


def attach(block: nn.Module, options: AdaptFormerOptions, seed: tuple) -> list[nn.Parameter]:
    weight = block.attn.qkv.weight
    adapter = AdaptFormer(weight.shape[1], options, (*seed, "beside_ffn"), weight.device)
    block.add_module(BESIDE_FFN, adapter)
    return list(adapter.parameters())


ADAPTERS.register("adaptformer", AdaptFormerOptions)(Adapter(attach))
