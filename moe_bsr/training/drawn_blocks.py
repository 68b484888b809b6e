"""The model for one update in which some blocks train (`alast.py`), and each leaves its share of the tokens.

Nothing of it outlasts the update. The optimizer knows all blocks: it steps what has a gradient.
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
    """While the context lasts these blocks train alone, and each leaves its share of the tokens."""
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
    """Keep rates: the budgets, or 1 where a block has too few tokens left to drop one, and in the last block, behind
    which nothing would profit."""
    rates = []
    for budget in budgets[:-1]:
        kept = count_kept(patches, budget)
        rates.append(budget if kept < patches else 1.0)
        patches = kept
    return [*rates, 1.0]


def _train(model: MultitaskViT, blocks: Collection[int]) -> None:
    """Let these blocks train alone, with the first one the embedding, and what comes behind the blocks."""
    layers, top = model.layers(), len(model.plan) + 1
    trained = {top, *(index + 1 for index in blocks), *([0] if 0 in blocks else [])}
    for parameter in model.parameters():
        parameter.requires_grad_(layers[id(parameter)] in trained)
    model.embedding_trains, model.path_start = 0 in blocks, min(blocks)


@contextlib.contextmanager
def following(model: MultitaskViT) -> Iterator[list[list[Tensor]]]:
    """While the context lasts, how far each block moves the class token in each pass: scalars, means over images."""
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


# --- the costliest update, for whoever predicts or measures ---


def costliest(model: MultitaskViT, config: Config) -> list[int]:
    """The blocks whose update takes most memory: the first, which puts all others on the gradient path, and the last
    ones, whose gradients are there while most is kept. No token is dropped then, for budgets may rise to 1.

    In bf16, where a block that trains keeps a little more, another draw may take half a percent more.
    """
    depth = len(model.plan)
    return [0, *range(depth - (config.train.alast.blocks or depth) + 1, depth)]


@contextlib.contextmanager
def costliest_update(model: MultitaskViT, config: Config) -> Iterator[set[str]]:
    """The model for that update while the context lasts, if it is trained so; yields the names of what does not train
    in it and does in others, whose optimizer state is there all the same."""
    if config.train.alast.blocks is None:
        yield set()
        return
    with drawn(model, costliest(model, config), [1.0] * len(model.plan)):
        yield {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def settle(model: MultitaskViT, config: Config, optimizer: torch.optim.Optimizer) -> None:
    """Leave a model in that update for good, as it comes after others: every weight has its optimizer state."""
    if config.train.alast.blocks is None:
        return
    _train(model, costliest(model, config))
    for parameter in (p for p in model.parameters() if not p.requires_grad):
        state = state_of(optimizer, parameter)
        optimizer.state[parameter] = {
            key: torch.zeros(like.shape, dtype=like.dtype, device=parameter.device) for key, like in state.items()
        }
