"""Full experts: two-layer MLPs that are initialized from a pretrained FFN (upcycling)."""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from moe_bsr.config import MoEConfig, require
from moe_bsr.ops.experts import is_aligned, mixture
from moe_bsr.ops.linear import compute_dtype
from moe_bsr.runtime.rng import generator


class Experts(nn.Module):
    """E independent two-layer MLPs with stacked parameters: fc1 (E, F, D) and (E, F), fc2 (E, D, F) and (E, D).

    The FFN's hidden units are cut into S slices; expert e starts with the units j for which j mod S = e mod S.

    * Full experts: S = FFN hidden width / expert hidden width. fc2 is scaled by S, its bias copied. With `mlp_ratio`
      equal to that of the FFN, S is 1 and every expert starts as a copy of the FFN.
    * Covering slices: S = top_k, which must divide the FFN's hidden width. fc2 is copied, its bias divided by S. The
      sum of one expert of each slice is the FFN.

    Attributes:
        slices: S.
        LR_SCALE: factor on the learning rate of the block. DECAYS: whether weight decay applies.
    """

    LR_SCALE, DECAYS = 1.0, True

    def __init__(self, mlp: Mlp, config: MoEConfig, seed: tuple) -> None:
        super().__init__()
        hidden, width = mlp.fc1.weight.shape
        self.slices = slices = _slices(config, hidden, width)
        scale, share = (1, slices) if config.experts == "covering_slices" else (slices, 1)
        draws = generator(*seed)
        units = [torch.arange(start, hidden, slices) for start in range(slices)]
        parts = {
            "fc1_weight": [mlp.fc1.weight[u] for u in units],
            "fc1_bias": None if mlp.fc1.bias is None else [mlp.fc1.bias[u] for u in units],
            "fc2_weight": [scale * mlp.fc2.weight[:, u] for u in units],
            "fc2_bias": None if mlp.fc2.bias is None else [mlp.fc2.bias / share] * slices,
        }
        for name, part in parts.items():
            copies = None if part is None else [part[e % slices].detach() for e in range(config.num_experts)]
            value = None if copies is None else torch.stack(copies)
            if value is not None and config.init_noise:
                noise = torch.randn(value.shape, generator=draws).to(value.device)
                value = value + config.init_noise * value.std() * noise
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.act = mlp.act
        self.backend = config.backend

    def forward(self, x: Tensor, gates: Tensor, chosen: Tensor, needs_output: bool = True) -> Tensor:
        """Return the gate-weighted sum of each token's chosen experts.

        Args:
            x: (T, D). gates: (T, K) float32. chosen: (T, K) int64. needs_output: as in `block.forward`.
        Returns:
            (T, D).
        """
        weights = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        if self.backend == "grouped":
            shape, dtype = tuple(self.fc1_weight.shape[1:]), compute_dtype(x)
            why = f"rows of experts {shape} in {dtype} are no multiples of 16 bytes; use loop"
            require(is_aligned(weights, dtype), "moe.backend", "grouped", why)
        return mixture(x, gates, chosen, weights, self.act, self.backend, needs_output)


def _slices(config: MoEConfig, hidden: int, width: int) -> int:
    """Return the number of slices into which the FFN is cut; 1 for whole copies.

    Raises:
        ConfigError: the FFN's hidden width is not divisible accordingly.
    """
    if config.experts == "covering_slices":
        divides = hidden % config.top_k == 0
        require(divides, "moe.top_k", config.top_k, f"must divide the FFN's hidden width {hidden} into slices")
        return config.top_k
    fitting = [ratio for ratio in range(1, hidden // width + 1) if hidden % (ratio * width) == 0]
    there_are = (
        f"here {' or '.join(map(str, fitting))}" if fitting else "no ratio does so here: leave plan.moe_blocks empty"
    )
    require(
        config.mlp_ratio in fitting,
        "moe.mlp_ratio",
        config.mlp_ratio,
        f"mlp_ratio x width = {config.mlp_ratio * width} must divide the FFN's hidden width {hidden}; {there_are}",
    )
    return hidden // (config.mlp_ratio * width)
