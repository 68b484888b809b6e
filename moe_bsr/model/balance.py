"""The balance loss: it keeps experts in use, per task or across all tasks together."""

import torch
from torch import Tensor, nn

from moe_bsr.config import MoEConfig
from moe_bsr.model.moe import Routing


def squared_cv(amount: Tensor) -> Tensor:
    """Squared coefficient of variation over the last dimension: population variance / mean^2.

    Through the variance, not the standard deviation: its gradient stays finite at perfect balance.
    """
    return amount.var(-1, correction=0) / amount.mean(-1) ** 2


class Balance(nn.Module):
    """The balance loss of all MoE layers, with the running shares that `across_tasks` needs.

    per_task (M3ViT) pushes every task to use all experts alike. across_tasks adds the other tasks'
    running shares (detached) before the variation is taken: the experts are used alike by all tasks
    together, and each task may specialize.
    """

    MOMENTUM = 0.9

    def __init__(self, config: MoEConfig, tasks: list[str], blocks: list[int]) -> None:
        super().__init__()
        self.kind = config.balance_loss if config.gate_learns else "none"
        self.weight = config.balance_loss_weight
        self.tasks, self.blocks = list(tasks), list(blocks)
        for name in ("importance", "load"):
            self.register_buffer(name, torch.zeros(len(tasks), len(blocks), config.num_experts))

    def forward(self, routing: dict[int, Routing], task: str) -> Tensor:
        """weight x mean over layers of (cv^2 of importance + cv^2 of load); a scalar."""
        if self.kind == "none" or not routing:
            return torch.zeros((), device=self.importance.device)
        terms = [
            squared_cv(self._amount(routing[block], name, layer, task)).to(torch.float32)
            for layer, block in enumerate(self.blocks)
            for name in ("importance", "load")
        ]
        return self.weight * torch.stack(terms).sum() / len(self.blocks)

    def _amount(self, routing: Routing, name: str, layer: int, task: str) -> Tensor:
        amount = getattr(routing, name)
        if self.kind == "per_task":
            return amount
        row, shares = self.tasks.index(task), getattr(self, name)[:, layer]
        return amount / amount.sum() + torch.cat([shares[:row], shares[row + 1 :]]).sum(0)

    @torch.no_grad()
    def update(self, routing: dict[int, Routing], task: str) -> None:
        """Fold one micro-batch into the running shares of `across_tasks`; a task's first one sets them."""
        if self.kind == "across_tasks":
            self.fold(self.shares(routing), task)

    @torch.no_grad()
    def shares(self, routing: dict[int, Routing]) -> Tensor:
        """(layers, 2, E): each expert's part of the importance and of the load in one micro-batch."""
        amounts = [[routing[block].importance, routing[block].load] for block in self.blocks]
        return torch.stack([torch.stack([amount / amount.sum() for amount in layer]) for layer in amounts])

    @torch.no_grad()
    def fold(self, shares: Tensor, task: str) -> None:
        """Fold the shares of one micro-batch into the running ones."""
        row = self.tasks.index(task)
        for layer in range(len(self.blocks)):
            for share, name in zip(shares[layer], ("importance", "load"), strict=True):
                running = getattr(self, name)[row, layer]
                running.copy_(torch.where(running.sum() > 0, torch.lerp(share, running, self.MOMENTUM), share))
