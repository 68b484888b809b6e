"""The plan: what each block is - trainable? keep rate after its attention? dense FFN or experts?

Full fine-tuning, last layer only, last-k, BSR, the MoE baseline and MoE-BSR are six plans. Blocks are
chosen by exact index. (The public implementation matches the index as a substring of the parameter
name, so that "2" also trains every `fc2` and `norm2`; four published rows carry that mistake.)
"""

from dataclasses import dataclass

from torch import nn

from moe_bsr.config import PlanConfig, require
from moe_bsr.model.tokens import count_kept


@dataclass(frozen=True, slots=True)
class BlockPlan:
    trainable: bool
    keep_rate: float
    moe: bool


def make_plan(config: PlanConfig, depth: int) -> list[BlockPlan]:
    """One BlockPlan per block.

    Raises:
        ConfigError: an index outside 0..depth-1, or a drop at the last block.
    """
    for key in ("train_blocks", "drop_blocks", "moe_blocks"):
        blocks = getattr(config, key)
        outside = [] if blocks == "all" else [i for i in blocks if not 0 <= i < depth]
        require(
            not outside,
            f"plan.{key}",
            blocks,
            f"{outside} outside the backbone's blocks 0 to {depth - 1} (counted from 0)",
        )
    rates = config.keep_rate if isinstance(config.keep_rate, list) else [config.keep_rate] * len(config.drop_blocks)
    keep = dict(zip(config.drop_blocks, rates, strict=True))
    require(
        keep.get(depth - 1, 1.0) == 1.0,
        "plan.drop_blocks",
        config.drop_blocks,
        f"block {depth - 1} is the last: nothing after a drop there would profit; drop earlier",
    )
    everything = config.train_blocks == "all"
    return [
        BlockPlan(everything or i in config.train_blocks, keep.get(i, 1.0), i in config.moe_blocks)
        for i in range(depth)
    ]


def block_storages(config: str | dict[str, list[int]], depth: int) -> list[str]:
    """The name of each block's storage: one for all, or those named and "exact" for the others.

    Raises:
        ConfigError: an index outside 0..depth-1, or a block named twice.
    """
    if isinstance(config, str):
        return [config] * depth
    storages = ["exact"] * depth
    named = [i for blocks in config.values() for i in blocks]
    outside = [i for i in named if not 0 <= i < depth]
    require(
        not outside, "storage", config, f"{outside} outside the backbone's blocks 0 to {depth - 1} (counted from 0)"
    )
    require(len(set(named)) == len(named), "storage", config, "each block once")
    for name, blocks in config.items():
        for index in blocks:
            storages[index] = name
    return storages


def freeze(vit: nn.Module, config: PlanConfig) -> None:
    """Set requires_grad of a timm VisionTransformer's parameters as the plan says.

    "all" trains everything; a list of blocks trains every parameter of those blocks and the final norm;
    an empty list trains nothing here (the heads, which are not part of `vit`, always train).
    """
    if config.train_blocks == "all":
        vit.requires_grad_(True)
        return
    vit.requires_grad_(False)
    for index in config.train_blocks:
        vit.blocks[index].requires_grad_(True)
    if config.train_blocks:
        vit.norm.requires_grad_(True)
        vit.fc_norm.requires_grad_(True)


def embedding_trains(vit: nn.Module) -> bool:
    """Whether anything before the first block requires a gradient."""
    later = [vit.blocks, vit.norm, vit.fc_norm, vit.head, vit.attn_pool]
    known = {id(p) for module in later if module is not None for p in module.parameters()}
    return any(p.requires_grad for p in vit.parameters() if id(p) not in known)


def gradient_path_start(vit: nn.Module) -> int:
    """Index of the first block whose backward must run; the depth if no block's.

    Computed from what requires a gradient after the plan was applied, never assumed from the
    first trainable block: a trainable embedding puts every block on the path.
    """
    if embedding_trains(vit):
        return 0
    trains = [any(p.requires_grad for p in block.parameters()) for block in vit.blocks]
    return trains.index(True) if True in trains else len(trains)


def token_counts(plan: list[BlockPlan], tokens: int, prefix: int, fuse: bool, protect: bool) -> list[tuple[int, int]]:
    """(tokens in attention, tokens in FFN) of each block. 197 at 0.5 thrice: 197 -> 100 -> 52 -> 28."""
    counts, has_fused = [], False
    for block in plan:
        entering = tokens
        candidates = tokens - prefix - (protect and has_fused)
        kept = count_kept(candidates, block.keep_rate)
        if kept < candidates:
            tokens, has_fused = prefix + kept + fuse, fuse
        counts.append((entering, tokens))
    return counts
