"""Updating within the backward pass: a parameter moves as soon as its gradient is whole, and the gradient goes (as LOMO
does, Lv et al. 2023, arXiv 2306.09782).

All gradients of a model are then never there together; at most those that one node of the graph returns at once. The
values are those of an update after the backward pass, to the bit: a parameter's gradient is whole when every use of it
has had its turn. Whatever looks at all gradients first has no place here: clipping their common norm, adding up
micro-batches or tasks. Each parameter's gradient can be clipped by its own norm.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class StepInBackward:
    """Attributes:
    stepped: the parameters that moved in the last backward pass, the first one first.
    norms: scalars, of each of their gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, limit: float | None = None) -> None:
        """
        Args:
            limit: the largest norm of each parameter's gradient; None or inf: not clipped.
        """
        self.optimizer, self.limit = optimizer, math.inf if limit is None else limit
        self.stepped: list[nn.Parameter] = []
        self.norms: list[Tensor] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """A region in which backward passes update; of one update."""
        self.stepped, self.norms = [], []
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        hooks = [p.register_post_accumulate_grad_hook(self._step) for p in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def norm(self) -> float:
        """Of all gradients of the update together, each of which is forgotten."""
        norms, self.norms = self.norms, []
        return float(torch.stack(norms).norm()) if norms else 0.0

    def _step(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:  # a block that runs again has all its parameters as inputs, used or not
            return
        clips = self.limit < math.inf
        norm = nn.utils.clip_grad_norm_(parameter, self.limit) if clips else parameter.grad.norm()
        self.norms.append(norm)
        self.optimizer.step()  # of the only parameter that has a gradient
        parameter.grad = None
        self.stepped.append(parameter)
