"""Rep-Net's residual learning on a ViT: a fresh block beside a frozen one (BSR section 5.1 and Table 5; for CNNs Yang
et al. 2022).

    x' = x + f(x) + g(x)

f is what the block adds to its tokens, g what a new one of its width and heads adds to the same tokens, those that are
left where the block drops or merges some. Here g is zero at the start: so are the projection behind its attention and
the last layer of its FFN. As `published`, both carry the identity and g is random at the start, x' = 2 x + f + g: each
side block doubles the stream, and the network begins as another than the pretrained one.

Gradients of side blocks go through the blocks behind them, so what they keep comes on top of the path: of each token 9
values of the width, for their input is kept once for both.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from moe_bsr.model.adapters import ADAPTERS, BESIDE_BLOCK, Adapter
from moe_bsr.model.fresh import fresh_block
from moe_bsr.model.layers import feed_forward


@dataclass(frozen=True)
class RepNetOptions:
    """published: both blocks carry the identity, and the new one is random at the start."""

    published: bool = False


class SideBlock(nn.Module):
    """g, as published x + g."""

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
        """What is added to the block's output: (B, N, D) -> (B, N, D), of the first token alone (B, 1, D).

        Args:
            bias: (B, N) float32, added to the logits of each key.
            needs_output: as of `Mlp`.
        """
        y, _ = self.attn(self.norm1(x), bias=bias, first_alone=first_alone)
        middle = (x[:, :1] if first_alone else x) + y
        return (middle if self.published else y) + feed_forward(self.mlp, self.norm2(middle), needs_output)


def attach(block: nn.Module, options: RepNetOptions, seed: tuple) -> list[nn.Parameter]:
    side = SideBlock(block, options, (*seed, BESIDE_BLOCK))
    block.add_module(BESIDE_BLOCK, side)
    return list(side.parameters())


ADAPTERS.register("repnet", RepNetOptions)(Adapter(attach))
