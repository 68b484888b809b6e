"""What this machine and these data are: seconds of a forward pass, images, and the memory there is."""

import dataclasses
import time
from dataclasses import dataclass

import torch

from moe_bsr.config import Config
from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.evaluation.features import split_features
from moe_bsr.fit import rungs
from moe_bsr.fit.room import Memory
from moe_bsr.model.multitask import MultitaskViT, build
from moe_bsr.runs import folder as run
from moe_bsr.runtime import memory
from moe_bsr.runtime.device import Runtime

IMAGES = 128  # of all tasks together, from which the speed is taken
EVALUATED = 64  # images at once in an evaluation


@dataclass(slots=True)
class Speed:
    """Attributes:
    forward: seconds for the frozen backbone on one image, read and decoded.
    images: for training, by task. decoded: bytes of all images for training and validation.
    """

    forward: float
    images: dict[str, int]
    classes: dict[str, int]
    decoded: int
    tokens: int
    width: int
    depth: int
    has_class_token: bool


def measure(config: Config, runtime: Runtime, limit: int | None) -> tuple[Speed, Memory]:
    """Open the tasks, and let the frozen backbone see some images of each.

    Args:
        limit: bytes that the process may take; None: nine tenths of what is free.
    """
    tasks = {name: run.open_task(config, file) for name, file in config.task_files().items()}
    classes = {name: len(data.class_names) for name, data in tasks.items()}
    model = runtime.place(build(rungs.start(config), classes)).eval()
    transforms = run.make_transforms(config, model)
    each = max(1, IMAGES // len(tasks))
    forward, decoded, resident = 0.0, 0, memory.resident()
    runtime.reset_peak()
    for data in tasks.values():
        first, second = _some(data, 0, each), _some(data, each, each)
        warm = _seconds(model, first, transforms, runtime, each)
        # Of images not read before: those that were are kept decoded.
        took = _seconds(model, second, transforms, runtime, each) if len(second.train) else warm
        decoded += (len(data.train) + len(data.val)) * data.train.source.image(data.train.place(0)).nbytes
        forward += took / len((second if len(second.train) else first).train) / len(tasks)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    resident = parameters if runtime.device.type == "cuda" else resident
    evaluation = max(0, int(runtime.peak_mb() * 2**20) - resident) * EVALUATED // min(EVALUATED, each)
    reason = "asked for"
    if limit is None:
        free = memory.available(runtime.device)
        limit = resident + int(0.9 * free[0]) if free else 2**62
        reason = f"nine tenths of what {free[1]} has free" if free else "no limit is known"
    vit = model.vit
    speed = Speed(
        forward,
        {name: len(data.train) for name, data in tasks.items()},
        classes,
        decoded,
        vit.num_prefix_tokens + vit.patch_embed.num_patches,
        vit.embed_dim,
        len(model.plan),
        vit.has_class_token,
    )
    return speed, Memory(limit, max(0, resident - parameters), evaluation, reason)


def _some(data: TaskData, start: int, count: int) -> TaskData:
    part = slice(start, start + count)
    return dataclasses.replace(
        data, train=dataclasses.replace(data.train, index=data.train.index[part], labels=data.train.labels[part])
    )


def _seconds(model: MultitaskViT, data: TaskData, transforms: ImageTransforms, runtime: Runtime, batch: int) -> float:
    began = time.monotonic()
    split_features(lambda x: model.features(model.forward_features(x)[0]), data, "train", transforms, runtime, batch)
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    return time.monotonic() - began
