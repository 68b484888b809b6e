"""Section `train.alast` of a configuration: adaptive layer selection (ALaST, Devoto et al. 2024).

In each update only some blocks train, and on a part of the tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_bsr.config.errors import require, require_within

if TYPE_CHECKING:
    from moe_bsr.config.schema import Config


@dataclass(kw_only=True, slots=True)
class AlastConfig:
    """Section `train.alast`. `configs/base.yaml` documents the keys."""

    blocks: int | None = None
    budget: float = 1.0
    min_budget: float = 0.5
    budget_lr: float | None = None

    def __post_init__(self) -> None:
        require_within("train.alast", self, blocks=(1, 1000))
        require(0 < self.min_budget <= 1, "train.alast.min_budget", self.min_budget, "above 0, at most 1: all tokens")
        only = f"train.alast.min_budget = {self.min_budget:g} to 1: the share of its tokens that a block keeps at first"
        require(self.min_budget <= self.budget <= 1, "train.alast.budget", self.budget, only)
        rate = self.budget_lr
        require(rate is None or 0 < rate <= 1e6, "train.alast.budget_lr", rate, "null (train.lr) or above 0")


def require_whole_blocks(config: "Config") -> None:
    """Refuse settings that cannot be combined with ALaST, where whole blocks train in some of the updates.

    Raises:
        ConfigError: a key has such a value.
    """
    train, plan, solver = config.train, config.plan, config.train.optimizer
    blocks = train.alast.blocks
    if blocks is None:
        return
    for key, value, fits, allowed, why in (
        ("plan.train_blocks", plan.train_blocks, plan.train_blocks == "all", "all", "each update draws among them"),
        ("plan.train_weights", plan.train_weights, plan.train_weights == "all", "all", "blocks train as a whole"),
        ("plan.drop_blocks", plan.drop_blocks, not plan.drop_blocks, "[]", "budgets say where tokens are dropped"),
        ("plan.moe_blocks", plan.moe_blocks, not plan.moe_blocks, "[]", "experts need every update to be balanced"),
        ("adapter", config.adapter, config.adapter is None, "null", "it would also train in blocks not drawn"),
        ("tokens.reduce", config.tokens.reduce, not config.tokens.merges, "drop", "the class token's attention ranks"),
        ("tokens.fuse", config.tokens.fuse, config.tokens.fuse == "none", "none", "dropped tokens are discarded"),
        ("sampler.kind", config.sampler.kind, config.sampler.kind != "joint", "another", "budgets belong to one task"),
        ("train.only", train.only, train.only is None, "null", "blocks train"),
        ("train.step_in_backward", train.step_in_backward, not train.step_in_backward, "false", "some blocks rest"),
        ("train.optimizer", solver, solver not in ("lbfgs", "mezo"), "adamw, adamw8 or sgd", "these use gradients"),
    ):
        require(fits, key, value, f"{allowed} with train.alast.blocks = {blocks}: {why}")
