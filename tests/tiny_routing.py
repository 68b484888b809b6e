"""Routing records with known properties, for tests of statistics and pictures."""

import torch

from moe_bsr.model.moe import Routing


def by_logits(logits: torch.Tensor, k: int) -> Routing:
    """Route by (B, N, E) logits as a layer would: the top k experts with renormalized gates."""
    probabilities = logits.softmax(-1)
    gates, experts = probabilities.topk(k)
    gates = gates / gates.sum(-1, keepdim=True)
    whole = torch.zeros_like(probabilities).scatter(-1, experts, gates).flatten(0, 1)
    return Routing(experts, gates, probabilities, whole.sum(0), (whole > 0).sum(0).float())


def to(experts: int, chosen: list[int], tokens: int = 60) -> Routing:
    """Route every token to the same `chosen` experts, with equal probability and none for the others."""
    logits = torch.full((1, tokens, experts), -100.0)
    logits[..., chosen] = 0.0
    return by_logits(logits, len(chosen))


def spread(experts: int, chosen: list[int], rounds: int = 20) -> Routing:
    """Route `rounds` tokens to each of the `chosen` experts in turn, one expert per token."""
    parts = [to(experts, [expert], rounds) for expert in chosen]
    return Routing(
        *(torch.cat([getattr(p, name) for p in parts], 1) for name in ("experts", "gates", "probabilities")),
        sum(p.importance for p in parts),
        sum(p.load for p in parts),
    )
