"""Ladder side tuning: a narrow network beside a frozen one, which reads the outputs of its blocks (LST, Sung et al.
2022, arXiv 2206.06522).

    s = pooled(input tokens of the first block)
    s = Block_i(mu_i s + (1 - mu_i) pooled(output of block i)),  mu_i = sigmoid(alpha_i / 0.1), alpha_i = 0 at the start
    heads read the frozen network's tokens + up(norm(s))

`up` is zero at the start, so the heads at first read the output of the frozen network. No gradient passes through the
backbone. An update therefore saves only the activations of the side blocks, 1 / `reduction` of those of full
fine-tuning. The frozen network runs only once per image if `data.feature_cache_mb` has room for what the ladder reads.
Pooling takes the mean of neighboring features; it has no weights and saves nothing. (The authors' code learns a
projection there, which saves the whole output of each block.)

    B images, N tokens, D width of the backbone, d = D / reduction
"""

from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moe_bsr.config import Config, require
from moe_bsr.config.registry import Choice
from moe_bsr.model import block
from moe_bsr.model.adapters import is_beside
from moe_bsr.model.fresh import fresh_block
from moe_bsr.model.layers import LayerNorm, Linear
from moe_bsr.model.plan import BlockPlan
from moe_bsr.model.replay import Replay
from moe_bsr.model.storage import STORAGES
from moe_bsr.model.tokens import KEPT_TOKENS, Dropped, Rung, Tokens
from moe_bsr.ops.tokens import reduce_tokens, take

TEMPERATURE = 0.1  # of the gates: they change ten times as fast as their parameters alpha


class SideBlock(nn.Module):
    """A gate and a narrow transformer block beside one block of the backbone."""

    def __init__(self, width: int, heads: int, device: torch.device, seed: tuple) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros((), device=device))
        self.block = fresh_block(width, heads, device, seed)

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        """Apply only the gate: mix the tokens x of the side network and the pooled `read`, each (B, N, d)."""
        return torch.lerp(read, x, torch.sigmoid(self.gate / TEMPERATURE).to(x.dtype))


class Ladder(nn.Module):
    """The side network of a frozen ViT.

    Attributes:
        first, last: the first and last block of the backbone with a side block. The side network starts from the input
            tokens of block `first`.
        side: side blocks, by the index of the backbone's block.
        first_alone: the heads read only the class token.
    """

    def __init__(self, vit: VisionTransformer, choices: dict[int, Choice], config: Config) -> None:
        super().__init__()
        self.first, self.last, self.depth = min(choices), max(choices), len(vit.blocks)
        self.reduction = choices[self.first].options.reduction
        self.prefix, self.tokens = vit.num_prefix_tokens, config.tokens
        self.first_alone = block.reads_class_token_alone(vit)
        width = vit.embed_dim // self.reduction
        heads = max(1, vit.blocks[0].attn.num_heads // self.reduction)
        require(
            vit.embed_dim % self.reduction == 0 and width % heads == 0,
            "adapter.reduction",
            self.reduction,
            f"a divisor of the width of {config.backbone.name}, {vit.embed_dim}, such as "
            f"{max(r for r in range(1, 9) if vit.embed_dim % r == 0)}",
        )
        device = vit.blocks[0].attn.qkv.weight.device
        self.side = nn.ModuleDict(
            {str(i): SideBlock(width, heads, device, (config.seed, "adapter", i)) for i in sorted(choices)}
        )
        self.norm = LayerNorm(width, eps=1e-6, device=device)
        self.up = nn.utils.skip_init(Linear, width, vit.embed_dim, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        plan = BlockPlan(trainable=True)
        self.context = block.BlockContext(plan, config.tokens, self.prefix, vit.has_class_token)

    def parameters_by_block(self) -> dict[int, list[nn.Parameter]]:
        """Return the parameters by block. The final norm and `up` count to the last side block."""
        found = {int(index): list(side.parameters()) for index, side in self.side.items()}
        found[self.last] += [*self.norm.parameters(), *self.up.parameters()]
        return found

    def reads(self, index: int) -> bool:
        """Return whether it reads the output of block `index`."""
        return str(index) in self.side

    def follows(self, index: int) -> bool:
        """Return whether the side network must drop the tokens that block `index` drops.

        After the last side block this is needed only if all tokens are pooled. If the heads read only the class token,
        the last side block outputs nothing else.
        """
        return index >= self.first and not (self.first_alone and index > self.last)

    def pass_by(self, index: int, before: Tokens, after: Tokens, dropped: Dropped | None, replay: Replay) -> Tokens:
        """Add to the block's output what the ladder will read of it.

        Args:
            before, after: input and output tokens of block `index`.
            dropped, replay: what the block dropped, and its recorded choices.
        Returns:
            `after` with one more rung. After the last block only the class token is kept if nothing reads the others.
        """
        rungs = before.rungs
        if index == self.first:
            rungs = (Rung(self._pooled(before.x)),)
        if index >= self.first:
            rung = Rung(self._pooled(after.x) if self.reads(index) else None)
            if self.follows(index) and (choice := replay.made(KEPT_TOKENS)) is not None:
                rung.kept, rung.scores = choice[0], dropped.scores
            rungs = (*rungs, rung)
        x = after.x
        if index == self.depth - 1 and self.first_alone:
            x = x[:, :1].contiguous()  # a view would keep all tokens in memory
        return replace(after, x=x, rungs=rungs)

    def forward(self, tokens: Tokens, storages: list[Choice]) -> Tensor:
        """Run the side network on all rungs, and return the tokens that the heads read.

        Args:
            tokens: output of the last block of the backbone, (B, N, D), with its rungs.
            storages: storage of each block of the backbone, which the side block beside it uses.
        Returns:
            (B, N, D).
        """
        bottom, *rungs = tokens.rungs
        x, fused = bottom.read, False
        for index, rung in enumerate(rungs, self.first):
            if rung.kept is not None:
                x, fused = self._follow(x, rung.kept, rung.scores, fused), self.tokens.fuses
            if rung.read is not None:
                x = self._step(index, x, rung.read, storages[index])
        return tokens.x + self.up(self.norm(x[:, : tokens.x.shape[1]]))

    def _step(self, index: int, x: Tensor, read: Tensor, storage: Choice) -> Tensor:
        """Run one side block, (B, N, d) -> (B, N, d), or (B, 1, d) if it is the last and heads read the class token."""
        side, replay = self.side[str(index)], Replay()
        alone = self.first_alone and index == self.last
        context = replace(self.context, class_token_alone=alone)

        def run(tokens: Tokens, needs_output: bool = True) -> tuple[Tokens, block.Record]:
            mixed = Tokens(side(tokens.x, read), tokens.origin)
            return block.forward(side.block, mixed, context, "", replay, None, needs_output)

        tokens = Tokens(x, x.new_empty(0, dtype=torch.int64))
        if torch.is_grad_enabled():
            return STORAGES[storage.kind].run(run, tokens, list(side.parameters()), storage.options)[0].x
        return run(tokens)[0].x

    @torch.no_grad()
    def _pooled(self, x: Tensor) -> Tensor:
        """Average neighboring features: (B, N, D) -> (B, N, d)."""
        return x.unflatten(2, (-1, self.reduction)).mean(3)

    def _follow(self, x: Tensor, kept: Tensor, scores: Tensor, fused: bool) -> Tensor:
        """Keep and fuse the same tokens as a block of the backbone (`tokens.drop`).

        Args:
            kept: (B, K) positions after the prefix. scores: (B, C). fused: whether the last token is a fused one.
        """
        stays = torch.zeros_like(scores, dtype=torch.uint8).scatter_(1, kept, 1)
        left, weights = stays.sort(dim=1, stable=True).indices[:, : scores.shape[1] - kept.shape[1]], None
        if self.tokens.fuses:
            weights = take(scores, left)
            protected = self.tokens.protect_fused and fused
            if self.tokens.fuse == "normalized":
                weights = weights / weights[:, : left.shape[1] - protected].sum(1, keepdim=True)
            if protected:  # add the fused token of an earlier drop, the last one, with weight 1
                weights[:, -1] = 1
            weights = weights.unsqueeze(2).to(x.dtype)
        return reduce_tokens(x, kept, left, weights, self.prefix)


def make_ladder(vit: VisionTransformer, plan: list[BlockPlan], config: Config) -> Ladder | None:
    """Create the side network of a plan; None if the plan has none.

    Raises:
        ConfigError: blocks of the backbone would train, tokens are merged, or the plan has other adapters too.
    """
    choices = {index: each.adapter for index, each in enumerate(plan) if is_beside(each.adapter)}
    if not choices:
        return None
    require(
        config.plan.train_blocks == [],
        "plan.train_blocks",
        config.plan.train_blocks,
        "must be [] (and plan.moe_blocks too) with adapter: ladder, which has no gradient path through the backbone",
    )
    require(
        not (config.tokens.merges and any(each.keep_rate < 1 for each in plan)),
        "tokens.reduce",
        config.tokens.reduce,
        "must be drop with adapter: ladder, which cannot follow merged tokens",
    )
    single = len(set(choices.values())) == 1 and all(each.adapter in (None, choices[min(choices)]) for each in plan)
    require(single, "adapter", config.adapter, "ladder with one reduction, and no other adapter in any block")
    return Ladder(vit, choices, config)
