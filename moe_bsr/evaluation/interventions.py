"""Does routing matter? What becomes of a trained mixture when its experts or its routers' choices are taken away.

Three changes of a finished model, in all its MoE blocks at once, each for the price of an evaluation:

    merged    the experts of a block are replaced by their mean: one FFN, whatever the routers say. Experts that are
              slices of an FFN are averaged slice by slice. Of low-rank experts the gates are replaced, by their mean
              over the batch: one adapter for the task
    swapped   a task is routed as another task would be: the next one, in their order
    shuffled  each token gets the experts and gates of another token of the batch, by lot

If merging costs nothing, the mixture is one FFN. If it costs and swapping does not, experts differ but tasks share them
alike. If shuffling costs and swapping does not, what matters is the token and not the task.
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
    """The answers of validation images with each change, beside those without.

    Args:
        model: in evaluation mode; it is left as it was. datasets: by task.
    Returns:
        One column for each of `KINDS`. With a single task nothing is swapped: no answer changes. None for a model
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
                stem, labels = model.forward_features(transforms.normalize(images, device=runtime.device)), labels
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
    """Within, all MoE blocks of the model compute with one of `KINDS`."""
    layers = [model.vit.blocks[index].mlp for index in model.balance.blocks]
    with ExitStack() as stack:
        for layer in layers:
            if kind == "merged":
                stack.enter_context(_instead(layer.experts, "forward", _merged(layer)))
            else:
                route = _swapped(layer, model.tasks) if kind == "swapped" else _shuffled(layer)
                stack.enter_context(_instead(layer, "route", route))
        yield


def _merged(layer: MoE) -> Callable[..., Tensor]:
    experts = layer.experts
    if isinstance(experts, LowRankExperts):
        return _alike(experts)

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


def _alike(experts: LowRankExperts) -> Callable[..., Tensor]:
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
def _instead(module: torch.nn.Module, name: str, function: Callable) -> Iterator[None]:
    """Within, the module's method is that function."""
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)
