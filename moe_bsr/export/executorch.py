"""Export a task's network as an ExecuTorch program: one file that a phone or board runs, one image at a time.

`torch.export` traces the model's own forward with plain kernels (`ops.reference`). The parts that XNNPACK supports, in
particular matrix products, are delegated to it. ExecuTorch's portable kernels run the rest. The batch size is fixed
to one image, since XNNPACK plans memory for the largest batch. Every expert is computed for every token, because the
program's shapes cannot depend on a router's choice.
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
    """Model for one task that returns only logits: images (B, 3, S, S) -> (B, classes)."""

    def __init__(self, model: MultitaskViT, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, images: Tensor) -> Tensor:
        tokens, _ = self.model.forward_features(images, self.task, upto=len(self.model.plan))
        return self.model.logits(tokens, self.task)


def write(place: Path, parts: dict[str, Part], size: int, on_step: Callable[[str], None]) -> None:
    """Write each task's program into a folder as <task>.pte."""
    for task, part in parts.items():
        on_step(f"{task}: lowering to ExecuTorch")
        files.write_new(place / f"{task}.pte", lowered(part, size))


def lowered(part: Part, size: int) -> bytes:
    """Return the content of a part's program file: normalized float32 (1, 3, S, S) -> logits (1, classes).

    Args:
        size: S, the image size in pixels.
    Raises:
        ConfigError: ExecuTorch cannot run this backbone.
    """
    if part.model.vit.dynamic_img_size:
        raise ConfigError(
            "format = executorch: this backbone.name resizes its position embeddings for every image (dynamic_img_size "
            "in timm), and ExecuTorch has no operator for that; export it as onnx"
        )
    images = torch.zeros(1, 3, size, size)
    with ops.reference(), torch.inference_mode(False), torch.no_grad(), _readable_flags():
        exported = torch.export.export(Classifier(part.model, part.task), (images,))
        return to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer


@contextlib.contextmanager
def _readable_flags() -> Iterator[None]:
    """Context in which cuDNN's convolutions have torch's default precision, although cuDNN computes nothing here.

    `torch.export` reads the setting with a getter that fails if convolutions and RNNs differ in it.
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    try:
        yield
    finally:
        convolutions.fp32_precision = before
