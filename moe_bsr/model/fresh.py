"""A newly initialized transformer block, of which side networks are made."""

import torch
from timm import layers as timm_layers
from timm.models.vision_transformer import Block
from torch import nn

from moe_bsr.model.layers import adopt
from moe_bsr.runtime.rng import generator

INIT_STD = 0.02


def fresh_block(width: int, heads: int, device: torch.device, seed: tuple) -> Block:
    """Create a block (B, N, width) -> (B, N, width) with biases and an FFN of four times its width."""
    with torch.device("meta"):
        block = Block(width, heads, qkv_bias=True, norm_layer=timm_layers.LayerNorm)
    block.to_empty(device=device)
    adopt(block)
    _initialize(block, seed)
    return block


@torch.no_grad()
def _initialize(block: nn.Module, seed: tuple) -> None:
    """Set matrices to normal values clamped at 2 standard deviations, norm weights to 1, and biases to 0."""
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2:
            draws = torch.randn(parameter.shape, generator=generator(*seed, name)).clamp_(-2, 2)
            parameter.copy_(INIT_STD * draws)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
