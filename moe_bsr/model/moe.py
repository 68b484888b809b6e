"""Mixture-of-experts FFN: a router and experts, upcycled from a dense FFN.

A task-routed MoE replaces a block's FFN (M3ViT style; BSR section 5.2); low-rank experts are added beside the FFN.
Every token of the block, class token included, is routed individually to its top-k experts, unless `moe.gate` says
otherwise. No token is dropped for lack of capacity. Shapes:

    T tokens of the micro-batch (images x tokens), D width, E experts, K = top_k
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm import layers as timm_layers
from torch import Tensor, nn

from moe_bsr.config import Config, MoEConfig, require
from moe_bsr.model.experts import Experts
from moe_bsr.model.layers import Mlp, feed_forward
from moe_bsr.model.low_rank import LowRankExperts
from moe_bsr.model.replay import Replay
from moe_bsr.model.routers import ROUTERS, FixedGates
from moe_bsr.ops.softmax import narrow_softmax
from moe_bsr.runtime.rng import generator


@dataclass(slots=True)
class Routing:
    """What one MoE layer did with the tokens of one micro-batch.

    Attributes:
        experts: (B, N, K) int64 chosen experts, best first.
        gates: (B, N, K) float32 combine weights; 0 for experts that a fixed gate leaves out. In the graph, except with
            the storages that recompute the whole block.
        probabilities: (B, N, E) float32 softmax over all experts, detached.
        importance: (E,) sum of the kept gates, in the graph (V-MoE, Riquelme et al. 2021, eq. 7).
        load: (E,) number of tokens; in the graph and smooth if there is gate noise, a count otherwise and with
            covering slices.
    """

    experts: Tensor
    gates: Tensor
    probabilities: Tensor
    importance: Tensor
    load: Tensor

    def repeated(self, times: int) -> "Routing":
        """Return the routing with each token repeated `times` times."""
        by_token = (t.repeat_interleave(times, 0) for t in (self.experts, self.gates, self.probabilities))
        return Routing(*by_token, times * self.importance, times * self.load)

    def of_images(self, batch: int, tokens: int) -> "Routing":
        """Return the routing with its (T, ...) tensors reshaped to (B, N, ...)."""
        by_token = (t.view(batch, tokens, t.shape[-1]) for t in (self.experts, self.gates, self.probabilities))
        return Routing(*by_token, self.importance, self.load)


class MoE(nn.Module):
    """Task-routed top-k mixture of experts, upcycled from a pretrained FFN.

    If gates are renormalized and every expert is a copy of the FFN, the new layer equals the FFN. If experts are slices
    of it (see `Experts`), this holds only if all gates are equal and cover every slice equally. `upcycling_error`
    measures the difference.
    """

    def __init__(self, mlp: nn.Module, config: MoEConfig, tasks: list[str], seed: tuple) -> None:
        super().__init__()
        require(
            type(mlp) in (timm_layers.Mlp, Mlp) and isinstance(mlp.norm, nn.Identity),
            "plan.moe_blocks",
            type(mlp).__name__,
            "experts are copies of a plain two-layer Mlp FFN; this backbone has another kind, so leave "
            "plan.moe_blocks empty",
        )
        self.gate, self.covers = config.gate, config.experts == "covering_slices"
        self.top_k = config.num_experts if config.has_fixed_gates else config.top_k
        self.renormalize = config.renormalize_gates and not config.has_fixed_gates
        self.noise_std = config.gate_noise / config.num_experts
        if config.has_fixed_gates:
            self.router: nn.Module = FixedGates(config.num_experts, tasks, config.gate == "task")
        else:
            router = ROUTERS[ROUTERS.choose(config.router).kind]
            self.router = router(mlp.fc1.in_features, config.num_experts, tasks, (*seed, "router"))
            _scale(self.router, 0.0 if config.gate == "prototype" else config.router_scale)
        low_rank = config.experts == "low_rank"
        self.shared = mlp if low_rank else None
        self.experts = (LowRankExperts if low_rank else Experts)(mlp, config, (*seed, "experts"))

    def forward(
        self, x: Tensor, task: str, replay: Replay, noise_key: tuple[int, ...] | None = None, needs_output: bool = True
    ) -> tuple[Tensor, Routing]:
        """Route (B, N, D) tokens of one task and run their experts.

        Args:
            replay: records or replays the choices.
            noise_key: seeds the gate noise; needed in training if there is any.
            needs_output: as in `block.forward`.
        Returns:
            (B, N, D) and the routing record.
        """
        flat = x.reshape(-1, x.shape[-1])
        routing = self.route(flat, task, replay, noise_key, len(x))
        y = self.experts(flat, routing.gates, routing.experts, needs_output).view_as(x)
        if self.shared is not None:
            y = y + feed_forward(self.shared, x, needs_output)
        return y, routing.of_images(*x.shape[:2])

    def route(
        self, x: Tensor, task: str, replay: Replay, noise_key: tuple[int, ...] | None, images: int = 1
    ) -> Routing:
        """Choose top-k experts for each of (T, D) tokens.

        Args:
            images: number of images, each with the same number of these tokens.
        Returns:
            The record, with shapes (T, ...).
        """
        if self.gate != "image":
            return self._route(x, task, replay, noise_key)
        by_image = x.view(images, -1, x.shape[-1])
        routing = self._route(by_image.mean(1, dtype=torch.float32), task, replay, noise_key)
        return routing.repeated(by_image.shape[1])

    def _route(self, x: Tensor, task: str, replay: Replay, noise_key: tuple[int, ...] | None) -> Routing:
        clean = logits = self.router(x, task)
        noisy = self.training and self.noise_std > 0
        if noisy:
            if noise_key is None:
                raise ValueError("gate noise in training needs forward(..., noise_key=(seed, step, ...))")
            noise = replay.record(
                "gate noise", lambda: torch.randn(clean.shape, generator=generator(*noise_key)).to(clean.device)
            )
            logits = clean + self.noise_std * noise
        if self.covers:
            return self._one_of_each_slice(logits, replay)
        probabilities = narrow_softmax(logits)
        if isinstance(self.router, FixedGates):
            probabilities = probabilities.nan_to_num()  # NaN if an ablation masks all experts of a task
        chosen = replay.record("experts", lambda: logits.topk(self.top_k).indices)
        gates = probabilities.gather(1, chosen)
        if self.renormalize:
            gates = gates / gates.sum(1, keepdim=True)
        nothing = gates.new_zeros(clean.shape)
        importance = nothing.scatter(1, chosen, gates).sum(0)
        load = smooth_load(clean, logits, chosen, self.noise_std) if noisy else nothing.scatter_(1, chosen, 1.0).sum(0)
        return Routing(chosen, gates, probabilities.detach(), importance, load)

    def _one_of_each_slice(self, logits: Tensor, replay: Replay) -> Routing:
        """Choose the best copy of each slice. Its gate is 1 and has the gradient of the log probability."""
        copies = logits.unflatten(1, (-1, self.top_k))  # expert e has slice e mod k
        of_slice = copies.softmax(1)
        best = replay.record("experts", lambda: copies.argmax(1))
        places = torch.arange(self.top_k, device=logits.device)
        found = of_slice.gather(1, best.unsqueeze(1)).squeeze(1)
        chosen, gates = best * self.top_k + places, found / found.detach()
        nothing = gates.new_zeros(logits.shape)
        importance, load = (nothing.scatter(1, chosen, g).sum(0) for g in (gates, torch.ones_like(gates)))
        return Routing(chosen, gates, of_slice.detach().flatten(1) / self.top_k, importance, load)


@torch.no_grad()
def _scale(router: nn.Module, factor: float) -> None:
    """Multiply the initial weights of a router, which sets how unequal its first probabilities are."""
    weights = router.weight.values() if isinstance(router.weight, nn.ParameterDict) else [router.weight]
    for weight in weights if factor != 1 else ():
        weight.mul_(factor)


def smooth_load(clean: Tensor, noisy: Tensor, chosen: Tensor, std: float) -> Tensor:
    """Return the expected tokens per expert, (E,), if the gate noise were drawn again (Shazeer et al. 2017, eq. 9).

    Args:
        clean, noisy: (T, E) logits. chosen: (T, K). std: of the noise.
    """
    experts, k = clean.shape[1], chosen.shape[1]
    if k == experts:
        return clean.new_full((experts,), float(clean.shape[0]))
    best = noisy.topk(k + 1).values
    inside = torch.zeros_like(clean, dtype=torch.bool).scatter(1, chosen, True)
    threshold = torch.where(inside, best[:, k:], best[:, k - 1 : k])
    columns = ((clean - threshold) / std).unsqueeze(2)  # saved in this form, which no storage compresses
    return torch.special.ndtr(columns).squeeze(2).sum(0)


def upcycle(blocks: Sequence[nn.Module], config: Config, tasks: list[str]) -> dict[int, float]:
    """Replace the FFNs of `plan.moe_blocks` by experts. Return each block's `upcycling_error`, none on meta."""
    errors = {}
    for index in config.plan.moe_blocks:
        mlp = blocks[index].mlp
        moe = MoE(mlp, config.moe, tasks, seed=(config.seed, "block", index))
        if not mlp.fc1.weight.is_meta:
            errors[index] = upcycling_error(moe, mlp, blocks[index].norm2, tasks[0])
        blocks[index].mlp = moe
    return errors


@torch.no_grad()
def upcycling_error(moe: MoE, mlp: Mlp, norm: nn.Module, task: str) -> float:
    """Return the relative L2 distance between a new MoE and its FFN on 256 normalized random tokens."""
    x = norm(torch.randn(1, 256, mlp.fc1.in_features, generator=generator("start error")).to(mlp.fc1.weight))
    training = moe.training
    y, _ = moe.eval()(x, task, Replay())
    moe.train(training)
    return float((y - mlp(x)).norm() / mlp(x).norm())
