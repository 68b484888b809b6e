"""Routers: from tokens and their task to logits over experts. Each registers itself under `moe.router`.

A router is created as `Router(width, experts, tasks, seed)` and called as `router(x, task)`: (T, D) -> (T, E) float32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_bsr.config.registry import Registry
from moe_bsr.ops.linear import float32_linear
from moe_bsr.runtime.rng import generator

INIT_STD = 0.02
TASK_EMBEDDING = 64  # width of the task-conditioned router's embedding of a task

ROUTERS: Registry[type[nn.Module]] = Registry("moe.router")


class FixedGates(nn.Module):
    """Router with fixed gates for each task, the same for every token. It returns their logarithms as logits.

    Its weights are gates instead of logits, so that a new task can start with the mean over several tasks.

    Args:
        by_task: divide the experts equally among the tasks, and let all tasks use the remaining ones. If False, every
            task uses all experts. A task's experts have equal gates.
    """

    def __init__(self, experts: int, tasks: list[str], by_task: bool) -> None:
        super().__init__()
        own = experts // len(tasks) if by_task else 0
        weight = {}
        for row, task in enumerate(tasks):
            used = torch.zeros(experts)
            used[row * own : (row + 1) * own] = used[own * len(tasks) :] = 1.0
            weight[task] = nn.Parameter(used / used.sum())
        self.weight = nn.ParameterDict(weight)

    def forward(self, x: Tensor, task: str) -> Tensor:
        return self.weight[task].float().log().expand(len(x), -1)

    def parameters_of_others(self, task: str) -> list[nn.Parameter]:
        return [weight for name, weight in self.weight.items() if name != task]


@ROUTERS.register("per_task")
class PerTaskRouter(nn.Module):
    """One bias-free linear router per task ("multi-gate" in M3ViT), always in float32."""

    def __init__(self, width: int, experts: int, tasks: list[str], seed: tuple) -> None:
        super().__init__()
        # Each task's router has its own seed, so adding a task changes no other router.
        weights = {task: INIT_STD * torch.randn(experts, width, generator=generator(*seed, task)) for task in tasks}
        self.weight = nn.ParameterDict({task: nn.Parameter(weight) for task, weight in weights.items()})

    def forward(self, x: Tensor, task: str) -> Tensor:
        return float32_linear(x, self.weight[task])

    def parameters_of_others(self, task: str) -> list[nn.Parameter]:
        """Return the parameters that are not used for tokens of `task`."""
        return [weight for name, weight in self.weight.items() if name != task]


@ROUTERS.register("task_conditioned")
class TaskConditionedRouter(nn.Module):
    """One router for all tasks. Its input is each token concatenated with an embedding of the task.

    The linear map of the concatenation is computed as the sum of its two parts.
    """

    def __init__(self, width: int, experts: int, tasks: list[str], seed: tuple) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.embed = nn.Sequential(
            nn.Linear(len(tasks), TASK_EMBEDDING),
            nn.GELU(),
            nn.Linear(TASK_EMBEDDING, TASK_EMBEDDING),
            nn.LayerNorm(TASK_EMBEDDING),
        )
        self.weight = nn.Parameter(torch.empty(experts, width + TASK_EMBEDDING))
        draws = generator(*seed)
        for parameter in (self.embed[0].weight, self.embed[2].weight, self.weight):
            std = INIT_STD if parameter is self.weight else parameter.shape[1] ** -0.5
            parameter.data = std * torch.randn(parameter.shape, generator=draws)
        for layer in (self.embed[0], self.embed[2]):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, task: str) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            one_hot = torch.zeros(len(self.tasks), device=x.device)
            one_hot[self.tasks.index(task)] = 1.0
            of_token, of_task = self.weight.split((x.shape[-1], TASK_EMBEDDING), dim=1)
            return float32_linear(x, of_token) + F.linear(self.embed(one_hot), of_task)

    def parameters_of_others(self, task: str) -> list[nn.Parameter]:
        return []
