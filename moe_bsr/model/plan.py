"""The plan: one row per block, which says whether it trains, how many tokens it keeps, whether its FFN is dense or a
mixture of experts, which adapter it has, and what it saves for its backward pass.

Full fine-tuning, last layer only, last-k, BSR, the MoE baseline and MoE-BSR are six plans. Blocks are chosen by exact
index. (The public implementation matches the index as a substring of the parameter name, so that "2" also trains every
`fc2` and `norm2`. Four published rows contain that mistake.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm import layers as timm_layers
from torch import nn

from moe_bsr.config import Config, ConfigError, PlanConfig, require
from moe_bsr.config.registry import Choice, Registry
from moe_bsr.model.adapters import ADAPTERS
from moe_bsr.model.storage import STORAGES
from moe_bsr.model.tokens import count_kept

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d, timm_layers.RmsNorm, timm_layers.SimpleNorm)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The plan of one block.

    Attributes:
        trainable: whether its pretrained parameters train.
        keep_rate: share of the tokens kept after its attention, in (0, 1]; 1 drops or merges none.
        moe: whether its FFN is a mixture of experts.
        adapter: its adapter, if any.
        storage: how it saves activations for its backward pass.
        weights: which of its parameters train, if it is trainable; see `freeze`.
    """

    trainable: bool
    keep_rate: float = 1.0
    moe: bool = False
    adapter: Choice | None = None
    storage: Choice = Choice("exact")
    weights: str = "all"


def make_plan(config: Config, depth: int) -> list[BlockPlan]:
    """Return one BlockPlan per block.

    Raises:
        ConfigError: an index outside 0..depth-1, a drop at the last block, a keep rate too low for merging, or an
            unknown storage or adapter.
    """
    plan = config.plan
    for key in ("train_blocks", "drop_blocks", "moe_blocks", "head_blocks"):
        blocks = getattr(plan, key)
        if blocks != "all":
            _require_blocks(f"plan.{key}", blocks, blocks, depth)
    keep = plan.keep_rates
    require(
        keep.get(depth - 1, 1.0) == 1.0,
        "plan.drop_blocks",
        plan.drop_blocks,
        f"block {depth - 1} is the last: no later block would gain from a drop there; drop earlier",
    )
    require(
        not config.tokens.merges or all(rate >= 0.5 for rate in keep.values()),
        "plan.keep_rate",
        plan.keep_rate,
        "at least 0.5 with tokens.reduce = merge: a block can merge at most half of its tokens",
    )
    everything = plan.train_blocks == "all"
    storages = choices_of_blocks(STORAGES, config.storage, depth, default=Choice("exact"))
    adapters = choices_of_blocks(ADAPTERS, config.adapter, depth, default=None)
    return [
        BlockPlan(
            everything or i in plan.train_blocks,
            keep.get(i, 1.0),
            i in plan.moe_blocks,
            adapters[i],
            storages[i],
            plan.train_weights if everything or i in plan.train_blocks else "all",
        )
        for i in range(depth)
    ]


def choices_of_blocks(registry: Registry, value: Any, depth: int, default: Choice | None) -> list[Choice | None]:
    """Return each block's choice from a registry.

    Args:
        value: for all blocks a kind or {kind: NAME, option: value}, or a list [{kind: NAME, blocks: [0, 1]}, ...], or
            None.
        default: for blocks that a list does not name, and for all blocks if `value` is None.
    Raises:
        ConfigError: unknown kind or option, an index outside 0..depth-1, or a block named twice.
    """
    if value is None:
        return [default] * depth
    if not isinstance(value, list):
        return [registry.choose(value)] * depth
    chosen: list[Choice | None] = [default] * depth
    named: list[int] = []
    for entry in value:
        blocks = entry.get("blocks") if isinstance(entry, dict) else None
        if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
            raise ConfigError(f"{registry.key} = {entry!r}: in a list, each entry is a mapping with kind and blocks")
        _require_blocks(registry.key, value, blocks, depth)
        named += blocks
        choice = registry.choose({key: option for key, option in entry.items() if key != "blocks"})
        for block in blocks:
            chosen[block] = choice
    require(len(set(named)) == len(named), registry.key, value, "each block once")
    return chosen


def _require_blocks(key: str, value: Any, blocks: Sequence[int], depth: int) -> None:
    outside = [i for i in blocks if not 0 <= i < depth]
    require(not outside, key, value, f"{outside} outside the backbone's blocks 0 to {depth - 1} (counted from 0)")


def freeze(vit: nn.Module, config: PlanConfig) -> None:
    """Set requires_grad of a backbone's parameters according to the plan.

    With `train_blocks` "all" everything trains. With a list of blocks, every parameter of those blocks and of the final
    norm trains. With an empty list nothing of the backbone trains; the heads, which are not part of `vit`, always do.

    If `train_weights` is not "all", only some parameters of those blocks and of the final norm train, and the embedding
    is frozen:

    * "proj": the projection after the attention, and the final norm (APLA, Sorkhei et al. 2025, arXiv 2503.11335).
    * "bias": every bias, also that of the final norm (BitFit, Zaken et al. 2021, arXiv 2106.10199).
    * "norm": scale and shift of every norm (LN tuning, Basu et al. 2023, arXiv 2304.14999).
    """
    which = config.train_weights
    if config.train_blocks == "all" and which == "all":
        vit.requires_grad_(True)
        return
    vit.requires_grad_(False)
    indices = range(len(vit.blocks)) if config.train_blocks == "all" else config.train_blocks
    for index in indices:
        for parameter in _chosen(vit.blocks[index], which):
            parameter.requires_grad_(True)
    if indices:
        for norm in (vit.norm, vit.fc_norm):
            for parameter in _chosen(norm, "bias" if which == "bias" else "all"):
                parameter.requires_grad_(True)


def _chosen(module: nn.Module, which: str) -> list[nn.Parameter]:
    """Return the parameters of a block or norm that `train_weights` selects, by module and never by their full name."""
    if which == "all":
        return list(module.parameters())
    if which == "proj":
        return list(module.attn.proj.parameters())
    if which == "norm":
        return [p for part in module.modules() if isinstance(part, NORMS) for p in part.parameters(recurse=False)]
    owned = [part.named_parameters(recurse=False) for part in module.modules()]
    return [parameter for each in owned for name, parameter in each if name == "bias"]


def stages(vit: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters before the first block, and then those of each block."""
    later = [vit.blocks, vit.norm, vit.fc_norm, vit.head, vit.attn_pool]
    known = {id(p) for module in later if module is not None for p in module.parameters()}
    return [[p for p in vit.parameters() if id(p) not in known], *(list(layer.parameters()) for layer in vit.blocks)]


def require_frozen(model: nn.Module, stages: list[list[nn.Parameter]]) -> None:
    """Refuse parameters before the gradient path that require a gradient, because they would silently get none.

    Args:
        stages: parameters of the embedding and of each block before the path.
    Raises:
        RuntimeError: `requires_grad` was set after the model was built.
    """
    if (trained := next((p for stage in stages for p in stage if p.requires_grad), None)) is not None:
        name = next(name for name, parameter in model.named_parameters() if parameter is trained)
        raise RuntimeError(
            f"{name} requires a gradient, but is before the gradient path, which was decided when the model was built: "
            "choose what trains with plan.train_blocks instead of requires_grad"
        )


def gradient_path(stages: list[list[nn.Parameter]]) -> tuple[bool, int]:
    """Return whether the embedding trains, and the first block whose backward pass must run (or the number of blocks).

    Both follow from the parameters that require a gradient after the plan was applied, not from the first trainable
    block: a trainable embedding puts every block on the gradient path.

    Args:
        stages: parameters of the embedding and of each block, as `stages` returns them.
    """
    embedding, *blocks = (any(p.requires_grad for p in stage) for stage in stages)
    return embedding, 0 if embedding else blocks.index(True) if True in blocks else len(blocks)


def token_counts(plan: list[BlockPlan], tokens: int, prefix: int, fuse: bool, protect: bool) -> list[tuple[int, int]]:
    """Return (tokens in attention, tokens in FFN) of each block.

    For example, three drops with keep rate 0.5 and fusion give 197 -> 100 -> 52 -> 28.
    """
    counts, has_fused = [], False
    for block in plan:
        entering = tokens
        candidates = tokens - prefix - (protect and has_fused)
        kept = count_kept(candidates, block.keep_rate)
        if kept < candidates:
            tokens, has_fused = prefix + kept + fuse, fuse
        counts.append((entering, tokens))
    return counts
