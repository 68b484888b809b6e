"""Balance loss: an auxiliary loss that keeps all experts in use, for each task or across tasks."""

import torch
from torch import Tensor, nn

from moe_bsr.config import MoEConfig
from moe_bsr.model.moe import Routing


def squared_cv(amount: Tensor) -> Tensor:
    """Return the squared coefficient of variation over the last dimension: population variance / mean^2.

    It is computed from the variance, because the gradient of a standard deviation is infinite at perfect balance.
    """
    return amount.var(-1, correction=0) / amount.mean(-1) ** 2


class Balance(nn.Module):
    """Balance loss of all MoE layers, with the running shares that `across_tasks` needs.

    `per_task` (M3ViT) pushes every task to use all experts equally. `across_tasks` first adds the running shares of the
    other tasks, detached, and then takes the variation. It pushes all tasks together to use the experts equally, so
    that each task may specialize.
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
        """Return the scalar loss: weight * mean over layers of (cv^2 of importance + cv^2 of load)."""
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
        """Add one micro-batch to the running shares, if the loss is `across_tasks`."""
        if self.kind == "across_tasks":
            self.fold(self.shares(routing), task)

    @torch.no_grad()
    def shares(self, routing: dict[int, Routing]) -> Tensor:
        """Return each expert's share of the importance and of the load in one micro-batch, (layers, 2, E)."""
        amounts = [[routing[block].importance, routing[block].load] for block in self.blocks]
        return torch.stack([torch.stack([amount / amount.sum() for amount in layer]) for layer in amounts])

    @torch.no_grad()
    def fold(self, shares: Tensor, task: str) -> None:
        """Update the running averages with one micro-batch's shares, (layers, 2, E). A task's first shares set them."""
        row = self.tasks.index(task)
        for layer in range(len(self.blocks)):
            for share, name in zip(shares[layer], ("importance", "load"), strict=True):
                running = getattr(self, name)[row, layer]
                running.copy_(torch.where(running.sum() > 0, torch.lerp(share, running, self.MOMENTUM), share))
