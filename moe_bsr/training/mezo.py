"""Training without a backward pass: the loss on both sides of the weights, along one random direction (MeZO, Malladi et
al. 2023, arXiv 2305.17333).

    g = (L(w + e z) - L(w - e z)) / 2 e,  z ~ N(0, 1),      w <- w - lr (g z + decay w)

g z is the gradient in the mean over z, and in a single update the gradient hidden in noise that grows with the number
of weights: train few of them (biases, small LoRA, heads), for many updates. Nothing is kept for a backward pass, and no
gradient or moment: an update's memory is that of inference, and a copy of the weights that train, from which they come
back to the bit (w + e z - e z does not). z is drawn again from the run's seed, the update and the parameter's name
wherever it is wanted, one parameter at a time.

Both sides see the same images, and the first decides for both which tokens are kept and which experts are chosen.
Only what takes part in a task's loss moves: the other tasks' heads and routers stay.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_bsr.config import TrainConfig
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.replay import deciding_once
from moe_bsr.runtime.rng import generator

UPDATE_KEY = 2  # integers of a noise key that name an update: the seed and its number
Pass = tuple[Any, tuple[Tensor, ...]]  # what the model returned, and the terms of its loss


class MeZO:
    """The estimates of one update, and its step.

    Attributes:
        slopes: by the parameter: g, summed over the micro-batches and tasks that it took part in.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, distance: float, takes_part: Callable[..., list[nn.Parameter]]
    ) -> None:
        """
        Args:
            optimizer: whose groups say what trains, by which names, rates and decays; it never steps itself.
            distance: e. takes_part: the inputs of a pass -> the parameters that its loss depends on.
        """
        self.optimizer, self.distance, self._takes_part = optimizer, distance, takes_part
        self.names = {p: n for g in optimizer.param_groups for p, n in zip(g["params"], g["names"], strict=True)}
        self.slopes: dict[nn.Parameter, float] = {}
        self._key: tuple[int, ...] = ()

    @torch.no_grad()
    def look(self, run: Callable[[], Pass], inputs: tuple, share: float) -> Pass:
        """Pass on both sides of the weights, which afterwards are what they were; returns the one side's output, and
        the terms of the loss in the middle.

        Args:
            run: one pass of these inputs, the last of which is a noise key. share: of the loss in that of the update.
        """
        self._key = inputs[-1][:UPDATE_KEY]
        parameters = [p for p in self._takes_part(*inputs) if p in self.names]
        before = [p.clone() for p in parameters]
        try:
            with deciding_once():
                self._move(parameters, self.distance)
                output, above = run()
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
                self._move(parameters, -self.distance)
                _, below = run()
        finally:
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        slope = share * float(sum(above) - sum(below)) / (2 * self.distance)
        for parameter in parameters:
            self.slopes[parameter] = self.slopes.get(parameter, 0.0) + slope
        return output, tuple((a + b) / 2 for a, b in zip(above, below, strict=True))

    def clip(self, limit: float) -> float:
        """Scale the estimate down to a norm; returns its norm before: the root of its mean square over directions."""
        norm = math.sqrt(sum(slope**2 * p.numel() for p, slope in self.slopes.items()))
        if norm > limit:
            self.slopes = {p: slope * limit / norm for p, slope in self.slopes.items()}
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that took part by its estimate, and forget the estimates."""
        for group in self.optimizer.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            for parameter in group["params"]:
                if parameter in self.slopes:
                    parameter.mul_(1 - rate * decay)
                    parameter.add_(self._direction(parameter), alpha=-rate * self.slopes[parameter])
        self.slopes = {}

    def _move(self, parameters: list[nn.Parameter], distance: float) -> None:
        for parameter in parameters:
            parameter.add_(self._direction(parameter), alpha=distance)

    def _direction(self, parameter: nn.Parameter) -> Tensor:
        """z of one parameter."""
        draws = torch.randn(parameter.shape, generator=generator("mezo", *self._key, self.names[parameter]))
        return draws.to(parameter.device, parameter.dtype)


def estimator_of(model: MultitaskViT, config: TrainConfig, optimizer: torch.optim.Optimizer) -> MeZO | None:
    """Of a run of our model, if it is trained so; the inputs of a pass are a batch and a noise key."""
    if config.differentiates:
        return None
    return MeZO(optimizer, config.mezo_distance, lambda batch, noise_key: model.parameters_of(batch.task))
