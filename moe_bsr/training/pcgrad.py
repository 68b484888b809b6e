"""PCGrad (projecting conflicting gradients, Yu et al. 2020), for parameters shared by several tasks.

Each task's gradient is compared with those of the other tasks, in random order. If their inner product is negative, the
component along the other gradient is removed. The update uses the sum of the projected gradients. Its coefficients
follow from the inner products of the original gradients, so only one gradient per task is in memory, and no projected
ones.
"""

import torch
from torch import Tensor, nn

from moe_bsr.runtime.rng import key, stream


class PCGrad:
    """Collects each task's gradient in one joint update, and combines them."""

    def __init__(self) -> None:
        self._tasks: list[dict[nn.Parameter, Tensor]] = []

    def keep(self, parameters: list[nn.Parameter]) -> None:
        """Store the gradients of one task, and reset those of the parameters."""
        self._tasks.append({parameter: parameter.grad for parameter in parameters})
        for parameter in parameters:
            parameter.grad = None

    def combine(self, noise_key: tuple[int, ...]) -> list[nn.Parameter]:
        """Set the combined gradient of every parameter, and return these parameters.

        Parameters that only one task uses (heads, routers) get that task's gradient unchanged.

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
        """Return the inner products of the tasks' gradients, (T, T) float64."""
        count = len(self._tasks)
        device = shared[0].device if shared else None
        products = torch.zeros(count, count, dtype=torch.float64, device=device)
        for parameter in shared:
            having = [k for k, task in enumerate(self._tasks) if parameter in task]
            rows = torch.stack([self._tasks[k][parameter].flatten().float() for k in having])
            places = torch.tensor(having, device=device)
            products[places[:, None], places] += (rows @ rows.T).double()
        return products.cpu()  # here, so that a GPU is waited for once


def projected(products: Tensor, noise_key: tuple[int, ...]) -> list[float]:
    """Return the coefficient of each task's gradient in the sum of the projected gradients.

    Args:
        products: (T, T) inner products of the gradients.
    """
    count = len(products)
    parts = torch.eye(count, dtype=torch.float64)  # row i: coefficients of the i-th projected gradient
    for i in range(count):
        for j in stream(key("pcgrad", *noise_key), i).permutation(count).tolist():
            against = float(parts[i] @ products[:, j])
            if j != i and against < 0:
                parts[i, j] -= against / float(products[j, j])
    return parts.sum(0).tolist()
