"""Take the optimizer step within the backward pass, as LOMO does (Lv et al. 2023, arXiv 2306.09782).

A parameter is updated as soon as its gradient is complete, and the gradient is freed. So only the gradients that one
node of the graph returns exist at the same time. The result equals an update after the backward pass, to the bit,
because autograd accumulates all uses of a parameter before the hook runs. Whatever needs all gradients first cannot be
combined with it: clipping the global norm, and adding up micro-batches or tasks. Clipping each parameter's gradient by
its own norm can.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class StepInBackward:
    """Takes the steps of an optimizer in backward passes, one parameter at a time.

    Attributes:
        stepped: the parameters updated in the last backward pass, in order.
        norms: the norms of their gradients before clipping, scalars.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, limit: float | None = None) -> None:
        """
        Args:
            limit: largest norm of each parameter's gradient. None or inf: clip nothing.
        """
        self.optimizer, self.limit = optimizer, math.inf if limit is None else limit
        self.stepped: list[nn.Parameter] = []
        self.norms: list[Tensor] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the backward pass also takes the optimizer step. Use it once per update."""
        self.stepped, self.norms = [], []
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        hooks = [p.register_post_accumulate_grad_hook(self._step) for p in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def norm(self) -> float:
        """Return the global norm of this update's gradients before clipping, and reset the record."""
        norms, self.norms = self.norms, []
        return float(torch.stack(norms).norm()) if norms else 0.0

    def _step(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:  # in recomputation all parameters of a block are inputs, used or not
            return
        clips = self.limit < math.inf
        norm = nn.utils.clip_grad_norm_(parameter, self.limit) if clips else parameter.grad.norm()
        self.norms.append(norm)
        self.optimizer.step()  # only this parameter has a gradient
        parameter.grad = None
        self.stepped.append(parameter)
