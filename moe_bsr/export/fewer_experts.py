"""Reduce a task's model to its most used experts. It becomes smaller and less accurate.

The use of an expert is the sum of its gates over training images of the task. The router then chooses only among the
kept experts. Nothing is trained again.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_bsr.config import require
from moe_bsr.export.mixture import affine
from moe_bsr.model.experts import Experts
from moe_bsr.model.moe import MoE
from moe_bsr.model.multitask import MultitaskViT


class RouterOfSome(nn.Module):
    """Linear router of one task that is restricted to some experts: rows of the original weight and bias."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor, task: str) -> Tensor:
        return F.linear(x.float(), self.weight, self.bias)


def moe_blocks(model: MultitaskViT) -> dict[int, MoE]:
    return {index: block.mlp for index, block in enumerate(model.vit.blocks) if isinstance(block.mlp, MoE)}


@torch.inference_mode()
def most_used(model: MultitaskViT, task: str, images: Iterable[Tensor], count: int) -> dict[int, list[int]]:
    """Return the indices of the `count` experts with the largest sums of gates, ascending, by block.

    Args:
        images: normalized batches (B, 3, S, S).
    Raises:
        ConfigError: `count` is smaller than top-k or larger than the number of experts, or the model has no experts
            or needs all of them.
        ValueError: no training image can be read.
    """
    layers = moe_blocks(model)
    require(bool(layers), "experts", count, "leave it out: this run has no experts")
    covers = any(moe.covers for moe in layers.values())
    require(not covers, "experts", count, "leave it out: with moe.experts = covering_slices every slice is needed")
    least = max(moe.top_k for moe in layers.values())
    most = min(len(moe.experts.fc1_weight) for moe in layers.values())
    require(least <= count <= most, "experts", count, f"{least} (each token chooses so many) to {most} (all experts)")
    sums: dict[int, Tensor] = {}
    for batch in images:
        for index, routing in model(batch, task).routing.items():
            sums[index] = sums.get(index, 0) + routing.importance
    if not sums:
        raise ValueError(f"task {task}: no training image can be read, so the use of its experts cannot be counted")
    return {
        index: sorted(total.argsort(descending=True, stable=True)[:count].tolist()) for index, total in sums.items()
    }


@torch.inference_mode(False)  # torch.export refuses tensors that were created in inference mode
@torch.no_grad()
def reduced(model: MultitaskViT, task: str, kept: dict[int, list[int]]) -> MultitaskViT:
    """Return the model for one task with only the experts in `kept`. All other parameters are shared, not copied."""
    smaller = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for index, moe in moe_blocks(smaller).items():
        weight, bias = affine(moe.router, model.vit.embed_dim, task)
        moe.router = RouterOfSome(weight[kept[index]], bias[kept[index]])
        for name, parameter in list(moe.experts.named_parameters(recurse=False)):
            moe.experts.register_parameter(name, nn.Parameter(parameter[kept[index]]))
    return smaller


def left_out(models: dict[str, MultitaskViT], kept: dict[str, dict[int, list[int]]], precision: str) -> int:
    """Return the size in bytes of the experts that no task keeps. For int8 their scales are left out.

    Args:
        kept: by task and block, the indices of the kept experts. Blocks that keep all may be absent.
    """
    used: dict[Experts, set[int]] = {}
    for task, blocks in kept.items():
        for index, ids in blocks.items():
            used.setdefault(models[task].vit.blocks[index].mlp.experts, set()).update(ids)
    each = 1 if precision == "int8" else 4
    return sum(
        each * sum(parameter[0].numel() * (len(parameter) - len(ids)) for parameter in experts.parameters())
        for experts, ids in used.items()
    )
