"""Low-rank experts: small two-layer networks beside an FFN that processes every token.

    y = FFN(x) + sum over e of gate_e(x) B_e act(A_e x + a_e),   A_e: (r, D), B_e: (D, r), 0 at the start

At the start the layer equals the FFN to the bit, whichever experts are chosen. All experts are computed at once, as one
adapter of rank E r whose hidden units are gated (`ops/low_rank.py`). Every kind of gate therefore costs the same.
"""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from moe_bsr.config import MoEConfig
from moe_bsr.ops.linear import linear
from moe_bsr.ops.low_rank import gated_linear
from moe_bsr.runtime.rng import generator


class LowRankExperts(nn.Module):
    """E experts of rank r, stacked like full experts: fc1 (E, r, D) and (E, r), fc2 (E, D, r); fc2 has no bias."""

    # They start at zero. With the blocks' learning rate they stay below 1 % of the FFN's output for tens of updates;
    # ten times that rate brings them to 12 to 15 %. Weight decay would shrink them further, so it is off.
    LR_SCALE, DECAYS = 10.0, False

    def __init__(self, mlp: Mlp, config: MoEConfig, seed: tuple) -> None:
        super().__init__()
        width, device = mlp.fc1.in_features, mlp.fc1.weight.device
        self.slices = 1
        # Each expert has its own seed, so their number changes none of them. Uniform as in torch's linear layers.
        drawn = [torch.rand(config.rank, width, generator=generator(*seed, e)) for e in range(config.num_experts)]
        self.fc1_weight = nn.Parameter(((2 * torch.stack(drawn) - 1) * width**-0.5).to(device))
        self.fc1_bias = nn.Parameter(torch.zeros(config.num_experts, config.rank, device=device))
        self.fc2_weight = nn.Parameter(torch.zeros(config.num_experts, width, config.rank, device=device))
        self.fc2_bias = None
        self.act = mlp.act

    def forward(self, x: Tensor, gates: Tensor, chosen: Tensor, needs_output: bool = True) -> Tensor:
        """Return the gate-weighted sum of each token's chosen experts.

        Args:
            x: (T, D). gates: (T, K) float32. chosen: (T, K) int64. needs_output: as in `block.forward`.
        Returns:
            (T, D).
        """
        all_gates = gates.new_zeros(len(x), len(self.fc1_weight)).scatter(1, chosen, gates)
        return self.of_gates(x, all_gates, needs_output)

    def of_gates(self, x: Tensor, gates: Tensor, needs_output: bool = True) -> Tensor:
        """Return the sum of all experts weighted with `gates` (T, E)."""
        hidden = linear(x, self.fc1_weight.flatten(0, 1), self.fc1_bias.flatten())
        return gated_linear(self.act, hidden, gates, self.fc2_weight, needs_output)
