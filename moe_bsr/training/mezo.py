"""Training without a backward pass: MeZO (Malladi et al. 2023, arXiv 2305.17333).

An update evaluates the loss on both sides of the weights, along one random direction:

    g = (L(w + e z) - L(w - e z)) / 2 e,  z ~ N(0, 1),      w <- w - lr (g z + decay w)

The mean of g z over z is the gradient. A single estimate has noise that grows with the number of weights, so train few
weights (biases, small LoRA, heads) for many updates. No activations, gradients or moments are stored. An update takes
the memory of inference plus a copy of the trained weights. The copy restores them to the bit, which w + e z - e z would
not. z is not stored either: it is drawn again, one parameter at a time, from the run's seed, the number of the update
and the parameter's name.

Both forward passes use the same images, and the second one replays the first one's kept tokens and chosen experts. Only
parameters that the task's loss depends on move; the heads and routers of the other tasks stay.
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
from moe_bsr.training.optim import names_of

UPDATE_KEY = 2  # the first integers of a noise key identify an update: the seed and the update's number
Pass = tuple[Any, tuple[Tensor, ...]]  # the model's output and the terms of its loss


class MeZO:
    """Gradient estimates of one update, and the step along them.

    Attributes:
        slopes: g by parameter, summed over the micro-batches and tasks whose loss depends on it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, distance: float, takes_part: Callable[..., list[nn.Parameter]]
    ) -> None:
        """
        Args:
            optimizer: its groups give the trained parameters, names, rates and decays. Its `step` is never called.
            distance: e. takes_part: maps the inputs of a pass to the parameters that its loss depends on.
        """
        self.optimizer, self.distance, self._takes_part = optimizer, distance, takes_part
        self.names = names_of(optimizer)
        self.slopes: dict[nn.Parameter, float] = {}
        self._key: tuple[int, ...] = ()

    @torch.no_grad()
    def look(self, run: Callable[[], Pass], inputs: tuple, share: float) -> Pass:
        """Run a forward pass on both sides of the weights, restore the weights, and add to the estimates.

        Args:
            run: does one forward pass with these inputs.
            inputs: inputs of the pass; the last one is the noise key.
            share: weight of this loss in the loss of the update.
        Returns:
            The output at w + e z, and the loss terms averaged over both sides.
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
        """Clip the estimate to a norm. Returns its previous norm, the root mean square over random directions."""
        norm = math.sqrt(sum(slope**2 * p.numel() for p, slope in self.slopes.items()))
        if norm > limit:
            self.slopes = {p: slope * limit / norm for p, slope in self.slopes.items()}
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has an estimate, and reset the estimates."""
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
        """Draw z of one parameter."""
        draws = torch.randn(parameter.shape, generator=generator("mezo", *self._key, self.names[parameter]))
        return draws.to(parameter.device, parameter.dtype)


def estimator_of(model: MultitaskViT, config: TrainConfig, optimizer: torch.optim.Optimizer) -> MeZO | None:
    """Return the estimator if `train.optimizer` is mezo, else None. A pass has a batch and a noise key as inputs."""
    if config.differentiates:
        return None
    return MeZO(optimizer, config.mezo_distance, lambda batch, noise_key: model.parameters_of(batch.task))
