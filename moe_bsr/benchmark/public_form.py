"""BSR as its public code computes it: with an explicit attention map, and everything saved by autograd.

This baseline of the benchmark separates the gain of the method from that of its implementation. It has timm's modules,
a softmax over the whole N x N map, and `torch.gather` for the tokens (which saves its source), no fused attention.
"""

import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moe_bsr.config import PlanConfig
from moe_bsr.model.plan import freeze


class ExplicitBSR(nn.Module):
    """A timm VisionTransformer with class token and head, trained under a plan without experts."""

    def __init__(self, vit: VisionTransformer, plan: PlanConfig) -> None:
        super().__init__()
        self.vit, self.drop, self.keep = vit, set(plan.drop_blocks), plan.keep_rate
        freeze(vit, plan)
        vit.head.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) images to (B, classes) logits."""
        vit = self.vit
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        for index, block in enumerate(vit.blocks):
            batch, tokens, width = x.shape
            heads = block.attn.num_heads
            q, k, v = block.attn.qkv(block.norm1(x)).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
            attention = ((q @ k.transpose(-2, -1)) * block.attn.scale).softmax(-1)
            x = x + block.attn.proj((attention @ v).transpose(1, 2).reshape(batch, tokens, width))
            if index in self.drop:
                x = self._drop(x, attention[:, :, 0, 1:].mean(1))
            x = x + block.mlp(block.norm2(x))
        return vit.head(vit.norm(x)[:, 0])

    def _drop(self, x: Tensor, scores: Tensor) -> Tensor:
        kept = math.ceil(self.keep * scores.shape[1])
        order = scores.argsort(1, descending=True)
        best, rest = order[:, :kept].sort(1).values, order[:, kept:]

        def gather(positions: Tensor) -> Tensor:
            return torch.gather(x[:, 1:], 1, positions.unsqueeze(2).expand(-1, -1, x.shape[2]))

        fused = (gather(rest) * torch.gather(scores, 1, rest).unsqueeze(2)).sum(1, keepdim=True)
        return torch.cat([x[:, :1], gather(best), fused.to(x.dtype)], 1)
