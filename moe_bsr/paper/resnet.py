"""ResNet-50 by the paper's memory rule (Table 5): what was tried; it does not give the printed figures."""

from functools import lru_cache

import torch
from torch import nn
from torchvision.models import resnet50

TRAINED = ("layer2.3", "layer3.5", "layer4.2", "fc")  # "the last blocks of layers 2, 3, 4", and the head
FLOAT = 4


@lru_cache
def leaves() -> tuple[tuple[str, nn.Module, int, int], ...]:
    """(name, module, input elements, output elements) of each leaf on one 224 px image, in forward order."""
    with torch.device("meta"):
        network = resnet50(num_classes=10)
        found: list[tuple[str, nn.Module, int, int]] = []
        for name, module in network.named_modules():
            if not any(module.children()):
                module.register_forward_hook(
                    lambda module, given, out, name=name: found.append((name, module, given[0].numel(), out.numel()))
                )
        network(torch.empty(1, 3, 224, 224))
    return tuple(found)


def activations(trained: tuple[str, ...] | None) -> float:
    """Peak bytes of one image; None trains everything.

    Convolutions, norms and the head keep their input where they train; a ReLU keeps a bit a value everywhere.
    """
    kept = peak = 0.0
    for name, module, given, out in leaves():
        linear, norm = isinstance(module, nn.Conv2d | nn.Linear), isinstance(module, nn.BatchNorm2d)
        relu = isinstance(module, nn.ReLU)
        peak = max(peak, kept + FLOAT * (given * (linear or norm or relu) + out * linear))
        if (linear or norm) and (trained is None or name.startswith(trained)):
            kept += FLOAT * given
        kept += given / 8 * relu
    return peak


def inputs(trained: tuple[str, ...] | None) -> float:
    """Bytes of the inputs of trained convolutions, norms and head, of one image, in all."""
    return float(
        FLOAT
        * sum(
            given
            for name, module, given, _ in leaves()
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
            and (trained is None or name.startswith(trained))
        )
    )


def forward_macs() -> int:
    """Multiply-adds of one image: each output of a convolution costs one filter."""
    return sum(
        out * module.weight[0].numel() for _, module, _, out in leaves() if isinstance(module, nn.Conv2d | nn.Linear)
    )
