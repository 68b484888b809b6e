"""ResNet-50 by the paper's memory rule (Table 5). For this network the paper's MB are 10^6 bytes.

The rule visits the leaf modules in the order of the forward pass and adds up what is kept in g. Before each leaf

    peak = max(peak, g + tmp + res)

Here tmp is the input and output of a convolution or the head, or the input of a norm; ReLUs work in place. res is the
block's input while inside a block, unless it is kept already. After each leaf, g grows by what the leaf keeps: its
input for a trained layer, one bit per value for a ReLU behind the first trained layer. Full fine-tuning trains
everything. BSR trains the convolutions of three blocks and the head, no norm. Its peak lies before the first of them,
while g is 0.
"""

from functools import lru_cache

import torch
from torch import nn
from torchvision.models import resnet50

TRAINED = ("layer2.3", "layer3.5", "layer4.2", "fc")  # "the last blocks of layers 2, 3, 4", and the head
FLOAT = 4


@lru_cache
def leaves() -> tuple[tuple[str, nn.Module, int, int], ...]:
    """Return (name, module, input elements, output elements) of each leaf for one 224 px image, in forward order."""
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
    """Return the peak bytes of one image's activations.

    Args:
        trained: name prefixes of the blocks and layers that train, except for their norms; None trains everything.
    """
    kept = peak = residual = 0.0
    inside, on_path = "", False
    for name, module, given, out in leaves():
        trains = trained is None or name.startswith(trained)
        linear, norm = isinstance(module, nn.Conv2d | nn.Linear), isinstance(module, nn.BatchNorm2d)
        if (block := ".".join(name.split(".")[:2])) != inside:
            inside, residual = block, FLOAT * given * (name.startswith("layer") and not trains)
        peak = max(peak, kept + FLOAT * (given * (linear or norm) + out * linear) + residual)
        if trains and (linear or norm and trained is None):
            kept, on_path = kept + FLOAT * given, True
        elif isinstance(module, nn.ReLU):
            kept += given / 8 * on_path
    return max(peak, kept)


def forward_macs() -> int:
    """Return the multiply-adds for one image: the size of a filter for each output of a convolution."""
    return sum(
        out * module.weight[0].numel() for _, module, _, out in leaves() if isinstance(module, nn.Conv2d | nn.Linear)
    )
