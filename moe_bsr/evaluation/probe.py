"""Probe images: a few fixed validation images of each task, whose tokens and routing are recorded.

The images are the same at every evaluation. So pictures of different steps show the same patches, and the change of
routing between two evaluations can be measured.
"""

import base64
import dataclasses
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.evaluation.evaluate import scoring
from moe_bsr.model.block import Record
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.tokens import FUSED
from moe_bsr.runtime.device import Runtime
from moe_bsr.runtime.rng import key, stream

ABSENT = -1  # stands for an expert if the token was dropped or fused before


@dataclass(slots=True)
class ProbeResult:
    """Result of running N images of a task through the network, on the CPU.

    Attributes:
        images: (N, 3, S, S) uint8. labels, predicted: (N,) int64.
        records: records of the N images by block, for blocks that drop or route.
    """

    images: Tensor
    labels: Tensor
    predicted: Tensor
    records: dict[int, Record]


def pick_probe_images(data: TaskData, count: int) -> TaskData:
    """Return the task with at most `count` validation images, drawn with a fixed seed; a larger count adds images."""
    order = stream(key(0, data.name, "probe")).permutation(len(data.val))[:count]
    return data.select("val", order)


def run_probe(model: MultitaskViT, data: TaskData, transforms: ImageTransforms, runtime: Runtime) -> ProbeResult:
    """Run all validation images of `data` (see `pick_probe_images`) in one batch, with evaluation transforms.

    It draws no random numbers, and restores the model's mode.
    """
    images, labels = next(transforms.eval_batches(data, "val", len(data.val)))
    with scoring(model), torch.inference_mode(), runtime.autocast():
        output = model(transforms.normalize(images, device=runtime.device), data.name)
    records = {block: _to_cpu(record) for block, record in output.records.items()}
    return ProbeResult(images, labels, output.logits.argmax(1).cpu(), records)


def _to_cpu(record: Record) -> Record:
    """Return the record with its tensors on the CPU."""
    parts = {}
    for name in ("dropped", "routing"):
        part = getattr(record, name)
        parts[name] = (
            None
            if part is None
            else dataclasses.replace(
                part,
                **{
                    f.name: tensor.cpu()
                    for f in dataclasses.fields(part)
                    if (tensor := getattr(part, f.name)) is not None
                },
            )
        )
    return Record(**parts)


def expert_map(records: dict[int, Record], prefix: int, patches: int) -> dict[int, np.ndarray]:
    """Return the experts of every token at every MoE block: (N, prefix + patches, K), ABSENT for dropped tokens.

    Args:
        prefix: number of prefix tokens. patches: number of patches of the image.
    """
    found, origin, merged = {}, None, None
    for block, record in sorted(records.items()):
        if record.dropped is not None:
            origin, merged = record.dropped.origin.numpy(), record.dropped.place
        if record.routing is not None:
            experts = record.routing.experts.numpy()
            images, _, k = experts.shape
            place = np.full((images, prefix + patches, k), ABSENT, np.int16)
            place[:, :prefix] = experts[:, :prefix]
            here = np.broadcast_to(np.arange(patches), (images, patches)) if origin is None else origin
            image, token = np.nonzero(here != FUSED)
            place[image, prefix + here[image, token]] = experts[image, prefix + token]
            if merged is not None:  # all patches of a merged token have its experts
                place[:, prefix:] = np.take_along_axis(experts[:, prefix:], merged.numpy()[:, :, None], 1)
            found[block] = place
    return found


def expert_overlap(now: np.ndarray, before: np.ndarray) -> float:
    """Return the mean share of a token's experts that it also had before, over tokens present both times.

    Args:
        now, before: (..., K) experts of the same tokens, from `expert_map`.
    Returns:
        A share in [0, 1]; NaN if no token is present both times.
    """
    both = (now[..., 0] != ABSENT) & (before[..., 0] != ABSENT)
    if not both.any():
        return float("nan")
    same = now[both][:, :, None] == before[both][:, None, :]
    return float(same.any(2).mean())


def pack(array: np.ndarray) -> dict:
    """Compress an int16 array into JSON values, which `unpack` reads."""
    return {"shape": array.shape, "int16": base64.b64encode(zlib.compress(array.tobytes())).decode()}


def unpack(packed: dict) -> np.ndarray:
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(packed["int16"])), np.int16)
    return numbers.reshape(packed["shape"])
