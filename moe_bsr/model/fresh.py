"""A transformer block of no backbone: what a side network is made of."""

import torch
from timm import layers as timm_layers
from timm.models.vision_transformer import Block
from torch import nn

from moe_bsr.model.layers import adopt
from moe_bsr.runtime.rng import generator

INIT_STD = 0.02


def fresh_block(width: int, heads: int, device: torch.device, seed: tuple) -> Block:
    """A block with biases and an FFN of four times its width, (B, N, width) -> (B, N, width), as a ViT begins."""
    with torch.device("meta"):
        block = Block(width, heads, qkv_bias=True, norm_layer=timm_layers.LayerNorm)
    block.to_empty(device=device)
    adopt(block)
    _begin(block, seed)
    return block


@torch.no_grad()
def _begin(block: nn.Module, seed: tuple) -> None:
    """Values as a ViT begins with."""
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2:
            draws = torch.randn(parameter.shape, generator=generator(*seed, name)).clamp_(-2, 2)
            parameter.copy_(INIT_STD * draws)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
