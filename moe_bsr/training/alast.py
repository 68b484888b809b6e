"""Adaptive layer selection (ALaST, Devoto et al. 2024, arXiv 2408.08670): each update trains few blocks on few tokens.

Each block has a budget b in (0, 1]. An update draws K blocks without replacement, with probabilities proportional to
their budgets. These blocks train, and the embedding trains together with block 0. The other blocks get no gradient, so
neither momentum nor weight decay moves them. After its attention, each block keeps the share b of its patch tokens that
the class token attends to most, and drops the others (in training only). A budget follows the distance D by which its
block moves the class token:

    b <- b + rate x (D - D in the task's previous update),   D = mean over the images of |class token after - before|^2

So b is its initial value plus the rate times the growth of D since then, as long as b stays within its limits.

Each task has its own budgets. D differs between tasks because their images differ; if tasks with alternating updates
shared a budget, that difference alone would move it. Also, a task's update then depends on no other task's budgets.
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
    """Budgets of a run: selects the blocks of each update, and adapts the budgets after it.

    It is a callback, so its state is in every checkpoint. Trial updates (`pace`, `lr_finder`) emit no events and thus
    leave its budgets unchanged.

    Attributes:
        budgets: one per block, by task. moved: D of each block in the task's last update, by task.
    """

    name = "alast"
    essential = True

    def __init__(self, model: MultitaskViT, config: Config) -> None:
        """
        Args:
            config: one that sets `train.alast.blocks`.
        """
        self.model, self.settings, self.seed = model, config.train.alast, config.seed
        own = self.settings.budget_lr
        self.rate = config.train.lr if own is None else own
        self.restore({})

    @contextlib.contextmanager
    def update(self, step: int, task: str) -> Iterator[None]:
        """Context for one task's forward and backward passes in update `step` (from 0): only the drawn blocks train."""
        with following(self.model) as self._seen, drawn(self.model, self.draw(step, task), self.budgets[task]):
            yield

    def draw(self, step: int, task: str) -> list[int]:
        """Return the blocks that train in this update, a function of the seed, the step and the budgets."""
        weights = torch.tensor(self.budgets[task], dtype=torch.float64)
        return torch.multinomial(weights, self.settings.blocks, generator=generator(self.seed, "alast", step)).tolist()

    def numbers(self, task: str) -> dict[str, float]:
        """Return the task's budgets by name, for the metrics of an update."""
        return {f"budget_{index}": budget for index, budget in enumerate(self.budgets[task])}

    def on_step(self, step: StepEvent) -> None:
        """Adapt the task's budgets to the update that was just taken."""
        moved = torch.stack([torch.stack(batches).mean() for batches in self._seen]).tolist()
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
            ValueError: the state does not hold budgets for exactly these tasks and blocks.
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
    """Return whether all values of the table are lists of `count` floats within these limits."""
    lists = list(table.values()) if isinstance(table, dict) else [None]
    whole = all(isinstance(each, list) and len(each) == count for each in lists)
    return whole and all(type(x) is float and least <= x <= most for each in lists for x in each)


def schedule_of(model: MultitaskViT, config: Config, ranks: Alone) -> Alast | None:
    """Return the ALaST schedule of a run, or None if `train.alast.blocks` is null.

    Raises:
        ConfigError: several processes train the run.
    """
    blocks = config.train.alast.blocks
    if blocks is None:
        return None
    only = "null with several processes, because each would see another part of the images; start it without torchrun"
    require(ranks.world == 1, "train.alast.blocks", blocks, only)
    return Alast(model, config)


def check(model: MultitaskViT, config: Config) -> None:
    """Check that the backbone has enough blocks, and a class token, from which the budgets are computed.

    Raises:
        ConfigError: naming the key.
    """
    blocks, depth, name = config.train.alast.blocks, len(model.plan), config.backbone.name
    require(blocks is None or blocks <= depth, "train.alast.blocks", blocks, f"at most the {depth} blocks of {name}")
    ranks_tokens = model.vit.has_class_token
    require(blocks is None or ranks_tokens, "train.alast.blocks", blocks, f"null: {name} has no class token")
