"""Expert ablation: measure how much accuracy each task loses if one expert of one block is masked.

How often an expert is chosen describes the router, not the value of the expert. Here one expert's router logit is set
to minus infinity, so that the token's next best expert replaces it, and the same images are classified again. The
inputs of the MoE blocks are cached, so only the blocks from the changed one on run again.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import bdtr
from torch import Tensor

from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.tokens import Tokens
from moe_bsr.runtime.device import Runtime


@dataclass(slots=True)
class Ablation:
    """Effect of E changes (such as masking each expert of a block) on T tasks, as counts of images.

    Attributes:
        images, right: (T,) int64 images of each task, and how many of them are right without a change.
        lost, gained: (T, E) int64 images that are right before a change and wrong after it, and the reverse.
    """

    tasks: list[str]
    images: np.ndarray
    right: np.ndarray
    lost: np.ndarray
    gained: np.ndarray

    def points(self) -> np.ndarray:
        """Return the accuracy lost, (T, E) in percentage points; negative if the change helps."""
        return 100 * (self.lost - self.gained) / self.images[:, None]

    def p_values(self) -> np.ndarray:
        """Return p-values (T, E) of the exact two-sided McNemar test. They may exceed 1; read those as 1."""
        return 2 * bdtr(np.minimum(self.lost, self.gained), self.lost + self.gained, 0.5)

    def clear(self) -> np.ndarray:
        """Return (T, E) bool: whether the effect is significant at 5 %, without correction for several tests."""
        return self.p_values() <= 0.05


def ablate(
    model: MultitaskViT,
    datasets: dict[str, TaskData],
    transforms: ImageTransforms,
    runtime: Runtime,
    batch_size: int = 64,
) -> dict[int, Ablation]:
    """Mask every expert of every MoE block in turn, on all validation images of `datasets`.

    Args:
        model: in evaluation mode. datasets: data by task.
    Returns:
        Results by MoE block. Empty for a model without experts, or with a single one, which cannot be replaced.
    """
    experts = model.balance.importance.shape[2]
    blocks = model.balance.blocks if experts > 1 else []
    tasks = list(datasets)
    found = {
        index: Ablation(
            tasks,
            np.zeros(len(tasks), np.int64),
            np.zeros(len(tasks), np.int64),
            *np.zeros((2, len(tasks), experts), np.int64),
        )
        for index in blocks
    }
    with torch.inference_mode(), runtime.autocast():
        for row, task in enumerate(tasks if blocks else []):
            for images, labels in transforms.eval_batches(datasets[task], "val", batch_size):
                inputs, logits = _first_pass(model, transforms.normalize(images, device=runtime.device), task)
                labels = labels.to(runtime.device)
                right = logits.argmax(1) == labels
                for index, result in found.items():
                    result.images[row] += len(labels)
                    result.right[row] += int(right.sum())
                    for expert in range(experts):
                        with masked(model, index, expert):
                            still = _rest(model, inputs[index], index, task).argmax(1) == labels
                        result.lost[row, expert] += int((right & ~still).sum())
                        result.gained[row, expert] += int((~right & still).sum())
    return found


def _first_pass(model: MultitaskViT, images: Tensor, task: str) -> tuple[dict[int, Tokens], Tensor]:
    """Return the input of each MoE block, and the logits with all experts."""
    tokens, _ = model.forward_features(images)
    start, inputs = model.path_start, {}
    for index in model.balance.blocks:  # all on the gradient path: experts are trained
        for passed in range(start, index):
            tokens = model.run_block(passed, tokens, task)
        inputs[index], start = tokens, index
    return inputs, _rest(model, tokens, start, task)


def _rest(model: MultitaskViT, tokens: Tokens, start: int, task: str) -> Tensor:
    """Return logits (B, classes) float32 from the tokens that enter block `start`."""
    for index in range(start, len(model.plan)):
        tokens = model.run_block(index, tokens, task)
    return model.logits(tokens, task)


@contextmanager
def masked(model: MultitaskViT, index: int, expert: int):
    """Context in which block `index` never chooses `expert`: its router logit is minus infinity."""

    def mask(router: torch.nn.Module, inputs: tuple, logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor([expert], device=logits.device), -torch.inf)

    handle = model.vit.blocks[index].mlp.router.register_forward_hook(mask)
    try:
        yield
    finally:
        handle.remove()
