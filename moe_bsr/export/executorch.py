"""A task's whole network as an ExecuTorch program: one file that a phone or a board runs, for one image at a time.

The model's own forward, of plain kernels (`ops.reference`), goes through `torch.export`. XNNPACK takes what it can, the
matrix products above all; ExecuTorch's portable kernels do the rest. The batch is fixed: XNNPACK plans its memory
for the largest one, and a device has one image. Every expert is computed for every token, for the program's shapes do
not depend on what a router says.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn

from moe_bsr import ops
from moe_bsr.config import ConfigError
from moe_bsr.export.network import Part
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime import files


class Classifier(nn.Module):
    """Images (B, 3, S, S) -> logits (B, classes) of one task, and nothing else that the model reports."""

    def __init__(self, model: MultitaskViT, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, images: Tensor) -> Tensor:
        tokens, _ = self.model.forward_features(images, self.task, upto=len(self.model.plan))
        return self.model.logits(tokens, self.task)


def write(place: Path, parts: dict[str, Part], size: int, on_step: Callable[[str], None]) -> None:
    """Put each task's program into a folder, as <task>.pte."""
    for task, part in parts.items():
        on_step(f"{task}: lowering to ExecuTorch")
        files.write_new(place / f"{task}.pte", lowered(part, size))


def lowered(part: Part, size: int) -> bytes:
    """The file of a part's program: normalized float32 (1, 3, S, S) -> logits (1, classes).

    Args:
        size: S.
    Raises:
        ConfigError: a backbone that ExecuTorch cannot run.
    """
    if part.model.vit.dynamic_img_size:
        raise ConfigError(
            "format = executorch: this backbone.name resizes its positions for every image (dynamic_img_size in timm), "
            "for which ExecuTorch has no operator; export it as onnx"
        )
    images = torch.zeros(1, 3, size, size)
    with ops.reference(), torch.inference_mode(False), torch.no_grad(), _readable_flags():
        exported = torch.export.export(Classifier(part.model, part.task), (images,))
        return to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer


@contextlib.contextmanager
def _readable_flags() -> Iterator[None]:
    """Inside, cuDNN's precision is torch's default: `torch.export` asks for it by a getter that knows no other.

    Nothing is computed by cuDNN here.
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    try:
        yield
    finally:
        convolutions.fp32_precision = before
