"""Take the optimizer step within the backward pass, as LOMO does (Lv et al. 2023, arXiv 2306.09782).

A group of parameters is updated as soon as all of its gradients are complete, and these are freed. By default each
parameter is a group by itself, so only the gradients that one node of the graph returns exist at the same time. The
result equals an update after the backward pass, to the bit, because autograd accumulates all uses of a parameter before
the hook runs. Whatever needs all gradients first cannot be combined with it: clipping the global norm, and adding up
micro-batches or tasks. The gradients of each group can be clipped by their common norm.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor, nn


class StepInBackward:
    """Takes the steps of an optimizer in backward passes, one group of parameters at a time.

    Attributes:
        stepped: the parameters updated in the last backward pass, in order.
        norms: the norm of each group's gradients before clipping, scalars.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        limit: float | None = None,
        group_of: Callable[[nn.Parameter], Hashable] = id,
    ) -> None:
        """
        Args:
            limit: largest norm of a group's gradients. None or inf: clip nothing.
            group_of: maps parameters to groups. Only used for clipping.
        """
        self.optimizer, self.limit = optimizer, math.inf if limit is None else limit
        self._group_of = group_of if self.limit < math.inf else id
        self.stepped: list[nn.Parameter] = []
        self.norms: list[Tensor] = []

    @contextlib.contextmanager
    def active(self, loss: Tensor) -> Iterator[None]:
        """Context in which the backward pass from `loss` also takes the optimizer step. Use it once per update."""
        self.stepped, self.norms = [], []
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._order = {parameter: place for place, parameter in enumerate(parameters)}
        self._missing = Counter(self._group_of(leaf) for leaf in leaves(loss) if leaf in self._order)
        self._waiting: dict[Hashable, list[tuple[nn.Parameter, Tensor]]] = {}
        hooks = [p.register_post_accumulate_grad_hook(self._arrive) for p in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if self._waiting:
            raise RuntimeError(f"{len(self._waiting)} groups of parameters without all of their gradients")

    def norm(self) -> float:
        """Return the global norm of this update's gradients before clipping, and reset the record."""
        norms, self.norms = self.norms, []
        return float(torch.stack(norms).norm()) if norms else 0.0

    def _arrive(self, parameter: nn.Parameter) -> None:
        """Take a gradient away from its parameter until its group is complete, so that no other step uses it."""
        group = self._group_of(parameter)
        waiting = self._waiting.setdefault(group, [])
        if parameter.grad is not None:  # in recomputation all parameters of a block are inputs, used or not
            waiting.append((parameter, parameter.grad))
            parameter.grad = None
        self._missing[group] -= 1
        if self._missing[group] == 0 and self._waiting.pop(group):
            self._step(waiting)

    def _step(self, gradients: list[tuple[nn.Parameter, Tensor]]) -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        parameters = sorted((parameter for parameter, _ in gradients), key=self._order.__getitem__)
        if self.limit < math.inf:
            self.norms.append(nn.utils.clip_grad_norm_(parameters, self.limit))
        else:
            self.norms += [parameter.grad.norm() for parameter in parameters]
        self.optimizer.step()  # only these parameters have a gradient
        for parameter in parameters:
            parameter.grad = None
        self.stepped += parameters


def leaves(loss: Tensor) -> list[Tensor]:
    """Return the leaf tensors for which a backward pass from `loss` runs their gradient hooks."""
    found, seen, nodes = [], set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found
