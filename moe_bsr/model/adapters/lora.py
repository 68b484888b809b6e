"""LoRA: a low-rank update beside linear layers (Hu et al. 2021, arXiv 2106.09685).

With `freeze_a` the first factor stays random (LoRA-FA, Zhang et al. 2023, arXiv 2308.03303), so the layer's input need
not be saved for it. The input of `attn.proj` (in float32) and that of `mlp.fc2` are saved anyway, by the attention and
by the activation. There LoRA saves only another tokens x rank values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moe_bsr.config import require
from moe_bsr.model.adapters import ADAPTERS, Adapter
from moe_bsr.model.adapters.wrapped import Wrapped, checked, wrap
from moe_bsr.model.layers import Linear, takes_activation
from moe_bsr.ops.linear import activated_linear, linear
from moe_bsr.runtime.rng import generator


@dataclass(frozen=True)
class LoRAOptions:
    """Options of LoRA.

    Attributes:
        rank: rank of the update. alpha: the update is scaled by alpha / rank.
        layers: names of the block's linear layers that get an update.
        freeze_a: keep the random factor A fixed.
    """

    rank: int = 8
    alpha: float = 16.0
    layers: list[str] = field(default_factory=lambda: ["attn.qkv"])
    freeze_a: bool = False

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 4096, "adapter.rank", self.rank, "at least 1, at most 4,096")
        allowed = "above 0, at most 10,000; at 0 the adapter has no effect and learns nothing"
        require(0 < self.alpha <= 10_000, "adapter.alpha", self.alpha, allowed)
        object.__setattr__(self, "layers", checked(self.layers))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoRALinear(Wrapped):
    """base(x) + alpha / rank * x A^T B^T. At the start A (rank, in) is random and B (out, rank) is zero."""

    def __init__(self, base: nn.Linear, options: LoRAOptions, seed: tuple) -> None:
        super().__init__()
        self.base, self.scale = base, options.scale
        device, (outputs, inputs) = base.weight.device, base.weight.shape
        draws = torch.randn(options.rank, inputs, generator=generator(*seed)) * inputs**-0.5
        self.lora_a = nn.Parameter(draws.to(device), requires_grad=not options.freeze_a)
        self.lora_b = nn.Parameter(torch.zeros(outputs, options.rank, device=device))
        self.new = [self.lora_a, self.lora_b]

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * linear(linear(x, self.lora_a, None), self.lora_b, None)

    def activated(self, act: nn.Module, x: Tensor, needs_output: bool = True) -> Tensor:
        """Compute the layer for act(x), saving x and `rank` values per token for the backward pass."""
        if not takes_activation(self.base):
            return self(act(x))
        update = linear(activated_linear(act, x, self.lora_a, None), self.lora_b, None)
        return self.base.activated(act, x, needs_output) + self.scale * update

    @torch.no_grad()
    def merged(self) -> Linear:
        """Add the update to the weight of the base layer and return that layer, which computes the same function."""
        self.base.weight += (self.scale * self.lora_b @ self.lora_a).to(self.base.weight.dtype)
        return self.base


def attach(block: nn.Module, options: LoRAOptions, seed: tuple) -> list[nn.Parameter]:
    return wrap(block, options.layers, lambda base, path: LoRALinear(base, options, (*seed, path)))


def merged_weight(options: LoRAOptions, weight: Tensor, saved: Mapping[str, Tensor]) -> Tensor:
    return weight + options.scale * saved["lora_b"] @ saved["lora_a"]


ADAPTERS.register("lora", LoRAOptions)(Adapter(attach, merged_weight))
