"""Section `moe` of a configuration: the experts of a block, and how they are chosen."""

from dataclasses import dataclass
from typing import Literal

from moe_bsr.config.errors import require, require_within

FIXED_GATES = ("task", "constant")  # these do not depend on the tokens


@dataclass(kw_only=True, slots=True)
class MoEConfig:
    """Section `moe`. `configs/base.yaml` documents the keys."""

    experts: Literal["full", "covering_slices", "low_rank"] = "full"
    num_experts: int = 16
    top_k: int = 4
    mlp_ratio: int = 4
    rank: int = 16
    gate: Literal["token", "image", "prototype", "task", "constant", "random"] = "token"
    router: str = "per_task"
    router_scale: float = 1.0
    train_router: bool = True
    renormalize_gates: bool = True
    gate_noise: float = 0.0
    init_noise: float = 0.0
    balance_loss: Literal["per_task", "across_tasks", "none"] = "per_task"
    balance_loss_weight: float = 0.01
    backend: Literal["auto", "loop", "grouped"] = "auto"

    def __post_init__(self) -> None:
        require_within("moe", self, num_experts=(1, 1024), rank=(1, 4096))
        require(
            1 <= self.top_k <= self.num_experts, "moe.top_k", self.top_k, f"1 to moe.num_experts = {self.num_experts}"
        )
        require(self.mlp_ratio >= 1, "moe.mlp_ratio", self.mlp_ratio, "at least 1 (hidden width = mlp_ratio x width)")
        for key in ("router_scale", "gate_noise", "init_noise", "balance_loss_weight"):
            require(0 <= getattr(self, key) <= 1000, f"moe.{key}", getattr(self, key), "at least 0, at most 1,000")
        require(
            self.experts != "covering_slices" or self.num_experts in range(2 * self.top_k, 1025, self.top_k),
            "moe.num_experts",
            self.num_experts,
            f"a multiple of moe.top_k = {self.top_k}, at least twice that, with moe.experts = covering_slices",
        )
        self._require_gate()
        chooses_one = self.top_k == 1 and self.experts != "covering_slices"
        require(
            not (chooses_one and self.renormalize_gates and self.learns_routers and self.num_experts > 1),
            "moe.top_k",
            self.top_k,
            "at least 2 with moe.renormalize_gates = true: a single renormalized gate is always 1, so that routers get "
            "no gradient from the task loss; or set moe.renormalize_gates=false",
        )

    def _require_gate(self) -> None:
        require(
            not self.has_fixed_gates or self.experts == "low_rank",
            "moe.gate",
            self.gate,
            f"token, image, prototype or random with moe.experts = {self.experts}; task and constant use many experts "
            "at once, which only moe.experts = low_rank computes cheaply",
        )
        require(
            not (self.has_fixed_gates and self.gate_noise),
            "moe.gate_noise",
            self.gate_noise,
            f"0 with moe.gate = {self.gate}, which is fixed",
        )
        require(
            self.gate != "prototype" or self.router == "per_task",
            "moe.router",
            self.router,
            "per_task with moe.gate = prototype: each task's router starts at the prototypes",
        )

    @property
    def has_fixed_gates(self) -> bool:
        """Whether the gates are constants: the same for every token of a task, and not trained."""
        return self.gate in FIXED_GATES

    @property
    def words(self) -> str:
        """Short description of the experts and the choice among them, such as "top-4 of 16"."""
        chosen = "" if self.has_fixed_gates else f"top-{self.top_k} of "
        kinds = {"full": "", "covering_slices": " slices", "low_rank": f" of rank {self.rank} beside the FFN"}
        return f"{chosen}{self.num_experts}{kinds[self.experts]}{'' if self.gate == 'token' else f' by {self.gate}'}"

    @property
    def gate_learns(self) -> bool:
        """Whether training changes this kind of gate, if `train_router` is true."""
        return self.gate not in (*FIXED_GATES, "random")

    @property
    def learns_routers(self) -> bool:
        return self.train_router and self.gate_learns
