"""Test whether routing matters: change the experts or the routing of a trained model and measure its accuracy.

There are three changes, each applied to all MoE blocks at once, and each as expensive as an evaluation:

    merged    The experts of a block are replaced by their mean: one FFN, whatever the routers choose. Experts that are
              slices of an FFN are averaged slice by slice. For low-rank experts, the gates are replaced by their mean
              over the batch: one adapter for the task.
    swapped   Each task uses the routers of another task, the next one in order.
    shuffled  Each token gets the experts and gates of a random token of the batch.

If merging costs no accuracy, the mixture acts as one FFN. If merging does and swapping does not, the experts differ but
all tasks use them alike. If shuffling does and swapping does not, routing depends on the token and not on the task.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.evaluation.ablation import Ablation
from moe_bsr.model.low_rank import LowRankExperts
from moe_bsr.model.moe import MoE, Routing
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.device import Runtime
from moe_bsr.runtime.rng import generator

KINDS = ("merged", "swapped", "shuffled")


def intervene(
    model: MultitaskViT,
    datasets: dict[str, TaskData],
    transforms: ImageTransforms,
    runtime: Runtime,
    batch_size: int = 64,
) -> Ablation | None:
    """Compare the answers on validation images with and without each change.

    Args:
        model: in evaluation mode. It is unchanged afterwards. datasets: data by task.
    Returns:
        A result with one column for each of `KINDS`. With a single task, swapping changes nothing. None for a model
        without experts, or with a single one.
    """
    if not model.balance.blocks or model.balance.importance.shape[2] == 1:
        return None
    tasks = list(datasets)
    counts = np.zeros((2, len(tasks)), np.int64), np.zeros((2, len(tasks), len(KINDS)), np.int64)
    result = Ablation(tasks, *counts[0], *counts[1])
    with torch.inference_mode(), runtime.autocast():
        for row, task in enumerate(tasks):
            for images, labels in transforms.eval_batches(datasets[task], "val", batch_size):
                stem = model.forward_features(transforms.normalize(images, device=runtime.device))
                labels = labels.to(runtime.device)

                def right(stem=stem, labels=labels, task=task) -> Tensor:
                    return model.forward_from(stem[0], task).logits.argmax(1) == labels

                before = right()
                result.images[row] += len(labels)
                result.right[row] += int(before.sum())
                for column, kind in enumerate(KINDS):
                    with changed(model, kind):
                        after = right()
                    result.lost[row, column] += int((before & ~after).sum())
                    result.gained[row, column] += int((~before & after).sum())
    return result


@contextmanager
def changed(model: MultitaskViT, kind: str) -> Iterator[None]:
    """Context in which one of `KINDS` is applied to all MoE blocks."""
    layers = [model.vit.blocks[index].mlp for index in model.balance.blocks]
    with ExitStack() as stack:
        for layer in layers:
            if kind == "merged":
                stack.enter_context(_replaced(layer.experts, "forward", _merged(layer)))
            else:
                route = _swapped(layer, model.tasks) if kind == "swapped" else _shuffled(layer)
                stack.enter_context(_replaced(layer, "route", route))
        yield


def _merged(layer: MoE) -> Callable[..., Tensor]:
    experts = layer.experts
    if isinstance(experts, LowRankExperts):
        return _with_mean_gates(experts)

    def mean(name: str, part: int) -> Tensor | None:
        value = getattr(experts, name)
        return None if value is None else value[part :: experts.slices].mean(0)

    def forward(x: Tensor, gates: Tensor, chosen: Tensor, needs_output: bool = True) -> Tensor:
        total = torch.zeros_like(x)
        for part in range(experts.slices):
            hidden = experts.act(F.linear(x, mean("fc1_weight", part), mean("fc1_bias", part)))
            total = total + F.linear(hidden, mean("fc2_weight", part), mean("fc2_bias", part))
        return gates.sum(1, keepdim=True) * total / experts.slices

    return forward


def _with_mean_gates(experts: LowRankExperts) -> Callable[..., Tensor]:
    def forward(x: Tensor, gates: Tensor, chosen: Tensor, needs_output: bool = True) -> Tensor:
        mean = gates.new_zeros(len(experts.fc1_weight)).index_add(0, chosen.flatten(), gates.flatten()) / len(x)
        return experts.of_gates(x, mean.expand(len(x), -1), needs_output)

    return forward


def _swapped(layer: MoE, tasks: list[str]) -> Callable[..., Routing]:
    route, following = layer.route, dict(zip(tasks, [*tasks[1:], tasks[0]], strict=True))
    return lambda x, task, *rest: route(x, following[task], *rest)


def _shuffled(layer: MoE) -> Callable[..., Routing]:
    route = layer.route

    def shuffled(x: Tensor, task: str, *rest: object) -> Routing:
        found = route(x, task, *rest)
        order = torch.randperm(len(x), generator=generator("shuffled choices")).to(x.device)
        return replace(found, experts=found.experts[order], gates=found.gates[order])

    return shuffled


@contextmanager
def _replaced(module: torch.nn.Module, name: str, function: Callable) -> Iterator[None]:
    """Context in which a method of the module is replaced by a function."""
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)
