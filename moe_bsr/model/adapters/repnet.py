"""Rep-Net's residual learning on a ViT: a new block beside a frozen one (BSR section 5.1 and Table 5; for CNNs Yang
et al. 2022).

    x' = x + f(x) + g(x)

f is the residual of the pretrained block, g that of a new block with the same width and heads. If the block drops or
merges tokens, g processes the same reduced tokens. Here g is zero at the start, because the projection after its
attention and the last layer of its FFN are zero. With `published`, both blocks carry the identity and g is random at
the start: x' = 2 x + f + g. Each side block then doubles the tokens, and the network does not start as the pretrained
one.

Gradients of side blocks pass through all later blocks. A side block therefore saves its activations in addition to
those of the gradient path: 9 activations of a token's width, because both blocks share the saved input.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from moe_bsr.model.adapters import ADAPTERS, BESIDE_BLOCK, Adapter
from moe_bsr.model.fresh import fresh_block
from moe_bsr.model.layers import feed_forward


@dataclass(frozen=True)
class RepNetOptions:
    """Options of Rep-Net.

    Attributes:
        published: as in the paper, both blocks carry the identity, and the new one is random at the start.
    """

    published: bool = False


class SideBlock(nn.Module):
    """The new block: g(x), or with `published` x + g(x)."""

    def __init__(self, block: nn.Module, options: RepNetOptions, seed: tuple) -> None:
        super().__init__()
        self.published, weight = options.published, block.attn.qkv.weight
        made = fresh_block(weight.shape[1], block.attn.num_heads, weight.device, seed)
        self.norm1, self.attn, self.norm2, self.mlp = made.norm1, made.attn, made.norm2, made.mlp
        if not self.published:
            for last in (self.attn.proj, self.mlp.fc2):  # their biases are zero anyway
                nn.init.zeros_(last.weight)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, first_alone: bool = False, needs_output: bool = True
    ) -> Tensor:
        """Return what is added to the output of the pretrained block.

        Args:
            x: (B, N, D).
            bias: (B, N) float32, added to the attention logits of each key.
            first_alone: compute only the first token.
            needs_output: as in `Mlp.forward`.
        Returns:
            (B, N, D), or (B, 1, D) with `first_alone`.
        """
        y, _ = self.attn(self.norm1(x), bias=bias, first_alone=first_alone)
        middle = (x[:, :1] if first_alone else x) + y
        return (middle if self.published else y) + feed_forward(self.mlp, self.norm2(middle), needs_output)


def attach(block: nn.Module, options: RepNetOptions, seed: tuple) -> list[nn.Parameter]:
    side = SideBlock(block, options, (*seed, BESIDE_BLOCK))
    block.add_module(BESIDE_BLOCK, side)
    return list(side.parameters())


ADAPTERS.register("repnet", RepNetOptions)(Adapter(attach))
