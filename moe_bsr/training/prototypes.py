"""Initialize routers with prototypes (`moe.gate: prototype`): each expert serves the tokens near one cluster center.

Before the first update, training images of all tasks run through the model once. The tokens that enter each block's
routers are clustered by direction (spherical k-means; the tokens come from a LayerNorm, so their norms are similar).
The centers become the weights of every task's router, scaled so that a token's logits have a standard deviation of 2.
So routing is meaningful and decisive from the first update. Tokens are distinguished by content, not by task.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_bsr.model.moe import MoE
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.rng import generator
from moe_bsr.training.inputs import Inputs
from moe_bsr.training.optim import MovingAverage

IMAGES = 2_000  # images of all tasks together
TOKENS = 20_000  # most tokens per block
ROUNDS = 15  # k-means iterations
BATCH = 50
SPREAD = 2.0  # standard deviation of a token's logits


def place(model: MultitaskViT, inputs: Inputs, seed: int, average: MovingAverage | None = None) -> list[str]:
    """Initialize the prototype routers that are still zero.

    Args:
        inputs: provides training images of all tasks. average: moving average, which gets the same initial values.
    Returns:
        A line for the user, or nothing if there were no such routers.
    """
    waiting = {
        index: moe
        for index, moe in zip(model.balance.blocks, model.mixtures(), strict=True)
        if moe.gate == "prototype" and not any(weight.any() for weight in moe.router.parameters())
    }
    if not waiting:
        return []
    tokens = _tokens(model, inputs, waiting, seed)
    names = {id(p): name for name, p in model.named_parameters()}
    for index, moe in waiting.items():
        found = prototypes(tokens[index], len(moe.experts.fc1_weight), (seed, "prototypes", index))
        for weight in moe.router.parameters():
            weight.data.copy_(found)
            if average is not None and (name := names[id(weight)]) in average.average:
                average.average[name].copy_(found)
    blocks = ", ".join(map(str, waiting))
    return [f"routers of blocks {blocks} start at prototypes of the training images' tokens"]


def prototypes(tokens: Tensor, count: int, seed: tuple) -> Tensor:
    """Return router weights (count, D) from spherical k-means of (T, D) tokens.

    Args:
        seed: seeds the choice of tokens that the centers start from. An empty cluster restarts at another token.
    """
    directions, draws = F.normalize(tokens.float(), dim=1), generator(*seed)
    start = torch.randint(len(directions), (ROUNDS + 1, count), generator=draws).to(tokens.device)
    centers = directions[start[0]]
    for round_ in range(1, ROUNDS + 1):
        nearest = (directions @ centers.t()).argmax(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, directions)
        empty = torch.bincount(nearest, minlength=count) == 0
        centers = F.normalize(torch.where(empty[:, None], directions[start[round_]], sums), dim=1)
    logits = tokens.float() @ centers.t()
    spread = logits.std(1, correction=min(1, count - 1)).mean()
    # One expert, or equal centers because all tokens are equal: there is nothing to choose, whatever the scale is.
    return centers * torch.where(spread > 1e-6, SPREAD / spread, 1.0)


@torch.no_grad()
def _tokens(model: MultitaskViT, inputs: Inputs, layers: dict[int, MoE], seed: int) -> dict[int, Tensor]:
    """Return (T, D) MoE input tokens by block, a random sample over all images."""
    found: dict[int, list[Tensor]] = {index: [] for index in layers}
    each = max(BATCH, TOKENS * BATCH // IMAGES)  # tokens per batch
    training = model.training

    def keep(index: int, x: Tensor) -> None:
        flat = x.flatten(0, 1)
        chosen = torch.randperm(len(flat), generator=generator(seed, "prototype tokens", index, len(found[index])))
        found[index].append(flat[chosen[:each].to(flat.device)].float())

    with contextlib.ExitStack() as hooks, inputs.runtime.autocast():
        for index, moe in layers.items():
            handle = moe.register_forward_pre_hook(lambda _, given, index=index: keep(index, given[0]))
            hooks.callback(handle.remove)
        for task, images in _images(inputs):
            model.eval()(images, task)
    model.train(training)
    return {index: torch.cat(parts) for index, parts in found.items()}


def _images(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """Yield task names and normalized training images, equally many of each task, with evaluation transforms."""
    for task, data in inputs.tasks.items():
        some = data.thinned("train", max(1, IMAGES // len(inputs.tasks)))
        for images, _ in inputs.transforms.eval_batches(some, "train", BATCH):
            yield task, inputs.transforms.normalize(images, device=inputs.runtime.device)
