"""The mixture-of-experts FFN: router | experts, upcycled from a dense FFN.

A task-routed MoE in place of a block's FFN (M3ViT style; BSR section 5.2). Every token of the block,
class token included, is routed on its own to its top-k experts; nothing is dropped. Shapes:

    T tokens of the micro-batch (images x tokens), D width, E experts, K = top_k
"""

from dataclasses import dataclass

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from moe_bsr.config import MoEConfig, require
from moe_bsr.cost.ledger import INDEX, ROW, Backward, Held, Ledger
from moe_bsr.model.replay import Replay
from moe_bsr.ops.experts import Experts, row_padding
from moe_bsr.ops.linear import float32_linear
from moe_bsr.runtime.rng import generator

TASK_EMBEDDING = 64


@dataclass(slots=True)
class Routing:
    """What one MoE layer did with the tokens of one micro-batch.

    Attributes:
        experts: (B, N, K) int64 chosen experts, best first.
        gates: (B, N, K) float32 combine weights, in the graph.
        probabilities: (B, N, E) float32 softmax over all experts, detached.
        importance: (E,) sum of the kept gates, in the graph (V-MoE, Riquelme et al. 2021, eq. 7).
        load: (E,) number of tokens; in the graph and smooth if there is gate noise, a count otherwise.
    """

    experts: Tensor
    gates: Tensor
    probabilities: Tensor
    importance: Tensor
    load: Tensor


class PerTaskRouter(nn.Module):
    """One bias-free linear router per task ("multi-gate" in M3ViT); float32 whatever the autocast."""

    def __init__(self, width: int, experts: int, tasks: list[str], seed: tuple) -> None:
        super().__init__()
        # Each task's router has its own generator: adding a task changes no other.
        self.weight = nn.ParameterDict(
            {task: nn.Parameter(0.02 * torch.randn(experts, width, generator=generator(*seed, task))) for task in tasks}
        )

    def forward(self, x: Tensor, task: str) -> Tensor:
        return float32_linear(x, self.weight[task])


class TaskConditionedRouter(nn.Module):
    """One router for all tasks; it sees each token with an embedding of the task beside it.

    The linear map of the concatenation [token, embedding] is computed as the sum of its two halves.
    """

    def __init__(self, width: int, experts: int, tasks: list[str], seed: tuple) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.embed = nn.Sequential(
            nn.Linear(len(tasks), TASK_EMBEDDING),
            nn.GELU(),
            nn.Linear(TASK_EMBEDDING, TASK_EMBEDDING),
            nn.LayerNorm(TASK_EMBEDDING),
        )
        self.weight = nn.Parameter(torch.empty(experts, width + TASK_EMBEDDING))
        draws = generator(*seed)
        for parameter in (self.embed[0].weight, self.embed[2].weight, self.weight):
            std = 0.02 if parameter is self.weight else parameter.shape[1] ** -0.5
            parameter.data = std * torch.randn(parameter.shape, generator=draws)
        for layer in (self.embed[0], self.embed[2]):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, task: str) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            one_hot = torch.zeros(len(self.tasks), device=x.device)
            one_hot[self.tasks.index(task)] = 1.0
            of_token, of_task = self.weight.split((x.shape[-1], TASK_EMBEDDING), dim=1)
            return float32_linear(x, of_token) + F.linear(self.embed(one_hot), of_task)


ROUTERS = {"per_task": PerTaskRouter, "task_conditioned": TaskConditionedRouter}


class MoE(nn.Module):
    """Task-routed top-k mixture of experts, upcycled from a pretrained FFN.

    At `ratio` equal to the FFN's own every expert starts as its copy, so that with renormalized gates
    the layer equals the FFN. At a smaller ratio expert e takes the hidden units j with
    j mod S = e mod S (S = FFN hidden width / expert hidden width), fc2 scaled by S, bias as it is: exact
    only when equal gates cover every residue equally; `start_error` measures the rest.
    """

    def __init__(self, mlp: nn.Module, config: MoEConfig, tasks: list[str], seed: tuple) -> None:
        super().__init__()
        require(
            type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity),
            "plan.moe_blocks",
            type(mlp).__name__,
            "experts are copies of a plain two-layer Mlp FFN; this backbone has "
            "another kind, so leave plan.moe_blocks empty",
        )
        self.top_k, self.renormalize = config.top_k, config.renormalize_gates
        self.noise_std = config.gate_noise / config.num_experts
        self.router = ROUTERS[config.router](mlp.fc1.in_features, config.num_experts, tasks, (*seed, "router"))
        self.experts = Experts(mlp, config, (*seed, "experts"))

    def forward(
        self, x: Tensor, task: str, replay: Replay, noise_key: tuple[int, ...] | None = None, needs_output: bool = True
    ) -> tuple[Tensor, Routing]:
        """(B, N, D) -> (B, N, D) and the routing record.

        Args:
            noise_key: seeds the gate noise, used in training when there is any.
            valued: whether the values are wanted, or only what the backward pass needs.
        """
        flat = x.reshape(-1, x.shape[-1])
        routing = self.route(flat, task, replay, noise_key)
        y = self.experts(flat, routing.gates, routing.experts, needs_output)
        for name in ("experts", "gates", "probabilities"):
            value = getattr(routing, name)
            setattr(routing, name, value.view(*x.shape[:2], value.shape[-1]))
        return y.view_as(x), routing

    def route(self, x: Tensor, task: str, replay: Replay, noise_key: tuple[int, ...] | None) -> Routing:
        """Choose top-k experts for each of (T, D) tokens; the record's shapes are (T, ...)."""
        clean = logits = self.router(x, task)
        noisy = self.training and self.noise_std > 0
        if noisy:
            if noise_key is None:
                raise ValueError("gate noise in training needs forward(..., noise_key=(seed, step, ...))")
            noise = replay.record(
                "gate noise", lambda: torch.randn(clean.shape, generator=generator(*noise_key)).to(clean.device)
            )
            logits = clean + self.noise_std * noise
        probabilities = logits.softmax(-1)
        chosen = replay.record("experts", lambda: probabilities.topk(self.top_k).indices)
        gates = probabilities.gather(1, chosen)
        if self.renormalize:
            gates = gates / gates.sum(1, keepdim=True)
        nothing = gates.new_zeros(clean.shape)
        importance = nothing.scatter(1, chosen, gates).sum(0)
        load = smooth_load(clean, logits, chosen, self.noise_std) if noisy else nothing.scatter_(1, chosen, 1.0).sum(0)
        return Routing(chosen, gates, probabilities.detach(), importance, load)

    def macs(self, tokens: int) -> int:
        """Of one image's forward pass: the router on every token, top_k experts for each."""
        one_expert = self.experts.fc1_weight[0].numel() + self.experts.fc2_weight[0].numel()
        return tokens * self.top_k * one_expert + self.router_macs(tokens)

    def router_macs(self, tokens: int) -> int:
        experts, width, _ = self.experts.fc2_weight.shape
        return tokens * experts * width


def largest_share(width: int, experts: int, k: int) -> float:
    """The largest expert's group over an equal one, as fresh routers make it: the spread of their logits, and
    with it this, grows with sqrt(width). Measured with random weights: 1.3, 1.5, 1.9 for DeiT-Ti, DeiT-S, ViT-B."""
    return min(1 + 0.03 * width**0.5, experts / k)


def moe_bytes(ledger: Ledger, moe: MoE, x: Held, tokens: int, needs_output: bool) -> tuple[Held, list[Held], Backward]:
    """Kept: tokens, choices, gates, and of each row its hidden values.

    How many rows each expert gets is decided by values; the statement is that of equal shares, each
    padded by half of what rows are padded to, and of `largest_share` (or what the ledger knows of this
    layer) for what only one expert has alive at a time. Returns output, what the routing record holds, and
    the backward.
    """
    experts, hidden, width = moe.experts.fc1_weight.shape
    size, k = ledger.size, moe.top_k
    padding = min(row_padding(tokens * k, experts, size == 2) // 2, tokens) * experts
    rows = tokens * k + padding
    each, left = divmod(rows, experts)
    cast = 0 if size == 4 else hidden * width * size
    share = ledger.shares.get(moe) or largest_share(width, experts, k)
    largest = int(share * each)
    routers = any(p.requires_grad for p in moe.router.parameters())

    def one_expert(wide: int, narrow: int, scratch: int) -> None:
        """So many hidden and narrow values of each row, a cast weight or gradient, and the kernel's scratch."""
        ledger.scratch(largest * (wide * hidden + narrow * width) * size + cast + scratch)

    wide = ledger.make(tokens * width * ROW if size == 2 else 0)
    logits, probabilities = (ledger.make(tokens * experts * ROW, packable=experts >= 16) for _ in range(2))
    ledger.free(wide, logits)
    chosen = ledger.make(tokens * k * INDEX, packable=False)
    ledger.decided += chosen.bytes + (tokens * experts * ROW if moe.noise_std else 0)
    gates = ledger.make(2 * tokens * k * ROW, packable=False)
    places = ledger.make((tokens * k + rows) * INDEX, packable=False)
    gate, summed = ledger.make(rows * ROW), ledger.make(tokens * width * ROW if needs_output else 0)
    before = [ledger.make((each + (e < left)) * hidden * size) for e in range(experts)] if ledger.grad else []
    inside = 0 if ledger.grad else 1
    one_expert(inside, 1, ledger.product_scratch(largest, width, hidden))
    if needs_output:
        one_expert(inside + 1, 1, ledger.product_scratch(largest, hidden, width))
    out = ledger.make(tokens * width * size if needs_output else 0) if size == 2 else summed
    ledger.free(gate, summed if size == 2 else None)
    images_tokens, ledger.tokens = ledger.tokens, max(each, 1)
    for tensor, kind in (
        (x, "expert inputs"),
        (places, "routing"),
        (gates, "routing"),
        (chosen, "routing"),
        *((part, "expert hidden") for part in before),
    ):
        ledger.save(tensor, kind)
    if routers and ledger.grad:
        ledger.save(probabilities, "routing")
        ledger.save(x, "expert inputs")
    ledger.tokens = images_tokens
    ledger.free(places, *before)

    def backward(grad: Held) -> Held | None:
        for tensor in (x, *before):
            ledger.restore(tensor)
        by_row, summed = ledger.make(2 * rows * ROW), ledger.make(tokens * width * ROW)
        one_expert(
            2,
            1,
            max(ledger.product_scratch(largest, width, hidden), ledger.weight_gradient_scratch(largest, width, hidden)),
        )
        one_expert(1, 2, ledger.product_scratch(largest, hidden, width))
        of_x = ledger.make(tokens * width * size) if size == 2 else summed
        for tensor in (x, places, gates, chosen, *before):
            ledger.release(tensor)
        ledger.free(by_row, summed if size == 2 else None, grad)
        if routers:
            ledger.restore(x)
            ledger.scratch(3 * tokens * experts * ROW + 2 * tokens * width * ROW)
            ledger.release(probabilities)
            ledger.release(x)
        return of_x

    return out, [chosen, gates, probabilities], backward


def smooth_load(clean: Tensor, noisy: Tensor, chosen: Tensor, std: float) -> Tensor:
    """(E,) expected tokens per expert if each expert's noise were drawn again (Shazeer et al. 2017, eq. 9).

    Args:
        clean, noisy: (T, E) logits. chosen: (T, K). std: of the noise.
    """
    experts, k = clean.shape[1], chosen.shape[1]
    if k == experts:
        return clean.new_full((experts,), float(clean.shape[0]))
    best = noisy.topk(k + 1).values
    inside = torch.zeros_like(clean, dtype=torch.bool).scatter(1, chosen, True)
    threshold = torch.where(inside, best[:, k:], best[:, k - 1 : k])
    return torch.special.ndtr((clean - threshold) / std).sum(0)


@torch.no_grad()
def upcycling_error(moe: MoE, mlp: Mlp, norm: nn.Module, task: str) -> float:
    """Relative L2 distance of a fresh MoE from the FFN it came from, on 256 normalized random tokens."""
    x = norm(torch.randn(1, 256, mlp.fc1.in_features, generator=generator("start error")).to(mlp.fc1.weight))
    training = moe.training
    y, _ = moe.eval()(x, task, Replay())
    moe.train(training)
    return float((y - mlp(x)).norm() / mlp(x).norm())
