"""Adaptive layer selection (ALaST, Devoto et al. 2024, arXiv 2408.08670): few blocks train in an update, on few tokens.

Each block has a budget b in (0, 1]. An update draws K blocks, without replacement and in proportion to their budgets;
these train, and so does the embedding with block 0. The other blocks have no gradient, so neither momentum nor weight
decay moves them. Behind its attention a block leaves the share b of its patch tokens, those the class token attends to
most; the others are dropped, in training alone. A budget follows how far its block moves the class token:

    b <- b + rate x (D - D of the task's update before),   D = mean over the images of |class token after - before|^2

So b is what it was at first, and the rate times what D has grown since, as long as it stays within its limits.

Each task has budgets of its own: D of two tasks differs by their images, and in alternating updates that difference
would be all that moves a budget they share. And a task's step then depends on no other task's budgets.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_bsr.config import Config, require
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.distributed import Alone
from moe_bsr.runtime.rng import generator
from moe_bsr.training.callback import Callback, StepEvent
from moe_bsr.training.drawn_blocks import drawn, following

LARGEST = torch.finfo(torch.float32).max


class Alast(Callback):
    """The budgets of a run, what they make of an update, and what it makes of them.

    It hears of updates as a callback does, so that its state is in every checkpoint; what only tries updates out
    (`pace`, `lr_finder`) leaves no trace in it.

    Attributes:
        budgets: of each block, by task. moved: D of each block in the task's last update, by task.
    """

    name = "alast"
    essential = True

    def __init__(self, model: MultitaskViT, config: Config) -> None:
        """
        Args:
            config: with `train.alast.blocks`.
        """
        self.model, self.settings, self.seed = model, config.train.alast, config.seed
        own = self.settings.budget_lr
        self.rate = config.train.lr if own is None else own
        self.restore({})

    @contextlib.contextmanager
    def update(self, step: int, task: str) -> Iterator[None]:
        """The model for one task's update, which is number `step` from 0: forward and backward passes belong in it."""
        with following(self.model) as self._seen, drawn(self.model, self.draw(step, task), self.budgets[task]):
            yield

    def draw(self, step: int, task: str) -> list[int]:
        """The blocks that train in this update: a function of the seed, the step and the budgets."""
        weights = torch.tensor(self.budgets[task], dtype=torch.float64)
        return torch.multinomial(weights, self.settings.blocks, generator=generator(self.seed, "alast", step)).tolist()

    def numbers(self, task: str) -> dict[str, float]:
        """The task's budgets, for the record of an update."""
        return {f"budget_{index}": budget for index, budget in enumerate(self.budgets[task])}

    def on_step(self, step: StepEvent) -> None:
        """The budgets of the task learn from the update that was just taken."""
        moved = [float(torch.stack(batches).mean()) for batches in self._seen]
        if (before := self.moved.get(step.task)) is not None:
            least = self.settings.min_budget
            self.budgets[step.task] = [
                min(1.0, max(least, budget + self.rate * (now - then)))
                for budget, now, then in zip(self.budgets[step.task], moved, before, strict=True)
            ]
        self.moved[step.task] = moved

    def state(self) -> dict[str, Any]:
        return {"budgets": self.budgets, "moved": self.moved}

    def restore(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: no budgets of these tasks and blocks.
        """
        tasks, depth, least = set(self.model.tasks), len(self.model.plan), self.settings.min_budget
        budgets = state.get("budgets", {task: [self.settings.budget] * depth for task in self.model.tasks})
        moved = state.get("moved", {})
        fits = _are_lists(budgets, depth, least, 1.0) and _are_lists(moved, depth, 0.0, LARGEST)
        if not fits or not budgets.keys() == tasks >= moved.keys():
            raise ValueError(f"no budgets of {len(tasks)} tasks and {depth} blocks: {state!a:.80}")
        self.budgets: dict[str, list[float]] = budgets
        self.moved: dict[str, list[float]] = moved
        self._seen: list[list[Tensor]] = []


def _are_lists(table: Any, count: int, least: float, most: float) -> bool:
    """Whether it has lists of so many numbers within these limits."""
    lists = list(table.values()) if isinstance(table, dict) else [None]
    whole = all(isinstance(each, list) and len(each) == count for each in lists)
    return whole and all(type(x) is float and least <= x <= most for each in lists for x in each)


def schedule_of(model: MultitaskViT, config: Config, ranks: Alone) -> Alast | None:
    """Of a run, if it is trained so.

    Raises:
        ConfigError: several processes share it.
    """
    blocks = config.train.alast.blocks
    if blocks is None:
        return None
    only = "null with several processes, each of which would see another part of the images; start it without torchrun"
    require(ranks.world == 1, "train.alast.blocks", blocks, only)
    return Alast(model, config)


def check(model: MultitaskViT, config: Config) -> None:
    """Refuse more blocks than there are, and a backbone without the class token that budgets are about.

    Raises:
        ConfigError: naming the key.
    """
    blocks, depth, name = config.train.alast.blocks, len(model.plan), config.backbone.name
    require(blocks is None or blocks <= depth, "train.alast.blocks", blocks, f"at most the {depth} blocks of {name}")
    ranks_tokens = model.vit.has_class_token
    require(blocks is None or ranks_tokens, "train.alast.blocks", blocks, f"null: {name} has no class token")
