"""Change the model for one ALaST update (`alast.py`): some blocks train, and each keeps its share of the tokens.

The change is undone after the update. The optimizer has the parameters of all blocks and steps those with a gradient.
"""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_bsr.config import Config
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.tokens import count_kept
from moe_bsr.training.optim import state_of


@contextlib.contextmanager
def drawn(model: MultitaskViT, blocks: Collection[int], budgets: list[float]) -> Iterator[None]:
    """Context in which only these blocks train, and each block keeps the share of its tokens given by its budget."""
    contexts, rates = model.contexts, _rates(budgets, model.vit.patch_embed.num_patches)
    model.contexts = [
        replace(each, plan=replace(each.plan, keep_rate=rate)) for each, rate in zip(contexts, rates, strict=True)
    ]
    try:
        _train(model, blocks)
        yield
    finally:
        model.contexts = contexts
        _train(model, range(len(contexts)))


def _rates(budgets: list[float], patches: int) -> list[float]:
    """Return the keep rates: the budgets, but 1 where a block has too few tokens left to drop one, and in the last
    block, after which dropping saves nothing."""
    rates = []
    for budget in budgets[:-1]:
        kept = count_kept(patches, budget)
        rates.append(budget if kept < patches else 1.0)
        patches = kept
    return [*rates, 1.0]


def _train(model: MultitaskViT, blocks: Collection[int]) -> None:
    """Train only these blocks, the layers after the last block and, if block 0 is among them, the embedding."""
    layers, top = model.layers(), len(model.plan) + 1
    trained = {top, *(index + 1 for index in blocks), *([0] if 0 in blocks else [])}
    for parameter in model.parameters():
        parameter.requires_grad_(layers[id(parameter)] in trained)
    model.embedding_trains, model.path_start = 0 in blocks, min(blocks)


@contextlib.contextmanager
def following(model: MultitaskViT) -> Iterator[list[list[Tensor]]]:
    """Context that records how far each block moves the class token: a list of scalars per block, means over images."""
    run_block = model.run_block
    seen: list[list[Tensor]] = [[] for _ in model.plan]

    def followed(index: int, tokens: Any, *arguments: Any) -> Any:
        after = run_block(index, tokens, *arguments)
        with torch.no_grad():
            moved = after.x[:, 0].float() - tokens.x[:, 0].float()
            seen[index].append(moved.square().sum(1).mean())
        return after

    model.run_block = followed
    try:
        yield seen
    finally:
        del model.run_block


# --- the costliest update, for cost prediction and measurement ---


def costliest(model: MultitaskViT, config: Config) -> list[int]:
    """Return the blocks whose update takes the most memory.

    These are the first block, which puts all others on the gradient path, and the last ones, whose gradients exist
    while most activations are still saved. The prediction assumes that no token is dropped, because budgets may rise
    to 1. In bf16 a trained block saves slightly more, so another draw may take half a percent more.
    """
    depth = len(model.plan)
    return [0, *range(depth - (config.train.alast.blocks or depth) + 1, depth)]


@contextlib.contextmanager
def costliest_update(model: MultitaskViT, config: Config) -> Iterator[set[str]]:
    """Context in which the model is set up for its costliest update, if it trains with ALaST.

    Yields the names of the parameters that do not train in this update but in others: their optimizer state takes
    memory all the same.
    """
    if config.train.alast.blocks is None:
        yield set()
        return
    with drawn(model, costliest(model, config), [1.0] * len(model.plan)):
        yield {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def settle(model: MultitaskViT, config: Config, optimizer: torch.optim.Optimizer) -> None:
    """Set the model up for its costliest update, with optimizer state for every parameter as after earlier updates."""
    if config.train.alast.blocks is None:
        return
    _train(model, costliest(model, config))
    for parameter in (p for p in model.parameters() if not p.requires_grad):
        state = state_of(optimizer, parameter)
        optimizer.state[parameter] = {
            key: torch.zeros(like.shape, dtype=like.dtype, device=parameter.device) for key, like in state.items()
        }
