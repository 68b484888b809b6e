"""Projecting conflicting gradients (PCGrad, Yu et al. 2020): tasks that share parameters do not undo each other's work.

Each task's gradient loses its part against another task's, one after the other in random order, wherever the two point
away from each other; the update takes the sum. All of it is arithmetic of the tasks' inner products, so the projected
gradients are never held: only one gradient for each task.
"""

import torch
from torch import Tensor, nn

from moe_bsr.runtime.rng import key, stream


class PCGrad:
    """Gathers the gradients of the tasks of one joint update, and writes what they come to."""

    def __init__(self) -> None:
        self._tasks: list[dict[nn.Parameter, Tensor]] = []

    def keep(self, parameters: list[nn.Parameter]) -> None:
        """Take the gradients of one task away from its parameters."""
        self._tasks.append({parameter: parameter.grad for parameter in parameters})
        for parameter in parameters:
            parameter.grad = None

    def combine(self, noise_key: tuple[int, ...]) -> list[nn.Parameter]:
        """Give all parameters their gradients of the update, and return these parameters.

        Parameters of one task alone (heads, routers) keep its gradient.

        Args:
            noise_key: integers that seed the order.
        """
        every = list(dict.fromkeys(parameter for task in self._tasks for parameter in task))
        shared = [p for p in every if sum(p in task for task in self._tasks) > 1]
        scales = projected(self._products(shared), noise_key)
        for parameter in every:
            if len(having := [k for k, task in enumerate(self._tasks) if parameter in task]) == 1:
                parameter.grad = self._tasks[having[0]][parameter]
                continue
            total = torch.zeros_like(parameter)
            for k in having:
                total.add_(self._tasks[k].pop(parameter), alpha=scales[k])
            parameter.grad = total
        self._tasks = []
        return every

    def _products(self, shared: list[nn.Parameter]) -> Tensor:
        """(T, T) inner products of the tasks' gradients, float64."""
        count = len(self._tasks)
        products = torch.zeros(count, count, dtype=torch.float64)
        for parameter in shared:
            having = [k for k, task in enumerate(self._tasks) if parameter in task]
            rows = torch.stack([self._tasks[k][parameter].flatten().float() for k in having])
            products[torch.tensor(having)[:, None], torch.tensor(having)] += (rows @ rows.T).double().cpu()
        return products


def projected(products: Tensor, noise_key: tuple[int, ...]) -> list[float]:
    """By how much each task's gradient counts in the sum of the projected ones.

    Args:
        products: (T, T) inner products of the gradients.
    """
    count = len(products)
    parts = torch.eye(count, dtype=torch.float64)  # row i: what the i-th projected gradient is made of
    for i in range(count):
        for j in stream(key("pcgrad", *noise_key), i).permutation(count).tolist():
            against = float(parts[i] @ products[:, j])
            if j != i and against < 0:
                parts[i, j] -= against / float(products[j, j])
    return parts.sum(0).tolist()
