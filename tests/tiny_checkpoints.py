"""Checkpoints of a few tensors."""

from pathlib import Path

import torch

from moe_bsr.runs.checkpoint import save


def tensors(step: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": {"a.weight": torch.randn(3, 4, generator=generator), "a.bias": torch.zeros(0)},
        "optimizer": {"a.weight/step": torch.tensor(float(step)), "n": torch.tensor([2**40, -1])},
    }


def save_steps(run: Path, *bests: int | None) -> None:
    """Save checkpoints 1, 2, ..., each with the best step so far."""
    for step, best in enumerate(bests, 1):
        save(run, step, tensors(step), {"step": step, "best_step": best})
