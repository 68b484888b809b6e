"""Measure the machine and the data: seconds of a forward pass, numbers of images, and available memory."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from moe_bsr import config as configuration
from moe_bsr.config import Config
from moe_bsr.config.probe import probe_config
from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.evaluation.features import split_features
from moe_bsr.fit import candidates
from moe_bsr.fit.memory_limit import SPARE, Memory, fitted
from moe_bsr.model.multitask import MultitaskViT, build
from moe_bsr.runs import folder as run
from moe_bsr.runtime import memory
from moe_bsr.runtime.device import Runtime

IMAGES = 128  # the most images to measure the speed with, over all tasks
FOR_IMAGES = 0.03  # share of the budget for this measurement
FIRST = 8  # images per task of a first measurement, which decides how many more the time allows


@dataclass(slots=True)
class Speed:
    """Speed of the machine, and sizes of data and backbone.

    Attributes:
        forward: seconds of the frozen backbone for one image, including reading and decoding it.
        opening: seconds for opening the tasks and building a model, which every run does.
        images, classes: numbers of training images and classes by task.
        decoded: bytes of all decoded images for training and validation.
        tokens, width, depth: of the backbone, prefix tokens included.
        head_blocks: the blocks whose class tokens the heads of every candidate read.
    """

    forward: float
    opening: float
    images: dict[str, int]
    classes: dict[str, int]
    decoded: int
    tokens: int
    width: int
    depth: int
    head_blocks: list[int]


def measure(config: Config, runtime: Runtime, limit: int | None, seconds: float) -> tuple[Speed, Memory]:
    """Open the tasks, and time the frozen backbone on some images of each.

    Args:
        limit: bytes that the process may use; None: what it uses already and nine tenths of the free memory.
        seconds: the whole time budget.

    Raises:
        ConfigError: not even training only the heads fits into the memory.
    """
    began = time.monotonic()
    tasks = {name: run.open_task(config, file) for name, file in config.task_files().items()}
    classes = {name: len(data.class_names) for name, data in tasks.items()}
    whole = configuration.replace(config, plan__drop_blocks=[], plan__keep_rate=1.0)  # as probe and late
    model = runtime.place(build(probe_config(whole, []), classes)).eval()
    transforms = run.make_transforms(config, model)
    opening = time.monotonic() - began
    resident = memory.resident()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    resident = parameters if runtime.device.type == "cuda" else resident
    reason = "asked for"
    if limit is None:
        free = memory.available(runtime.device)
        limit = resident + int(0.9 * free[0]) if free else 2**62
        reason = f"nine tenths of what {free[1]} has free" if free else "no limit is known"
    base = max(0, resident - parameters) + (0 if runtime.device.type == "cuda" else SPARE)
    there = Memory(limit, base, reason)
    head_blocks = candidates.head_blocks(config, len(model.plan), model.vit.has_class_token)
    probe = candidates.probe(config, head_blocks)
    # Raises before anything slow if not even the probe fits.
    fitted(probe, classes, there, runtime.precision, 0)
    most = max(1, IMAGES // len(tasks))
    forward, decoded = 0.0, 0
    for data in tasks.values():
        part, start, count = data, 0, min(FIRST, most)
        # The second time counts, because kernels are chosen by then. It needs other images: the first ones are cached.
        for _ in range(2):
            part = data.select("train", np.arange(len(data.train))[start : start + count])
            if not len(part.train):
                break
            each = _seconds(model, part, transforms, runtime, most) / len(part.train)
            start, count = count, max(1, min(most, int(FOR_IMAGES * seconds / len(tasks) / max(each, 1e-9))))
        decoded += (len(data.train) + len(data.val)) * data.train.source.image(data.train.place(0)).nbytes
        forward += each / len(tasks)
    vit = model.vit
    speed = Speed(
        forward,
        opening,
        {name: len(data.train) for name, data in tasks.items()},
        classes,
        decoded,
        vit.num_prefix_tokens + vit.patch_embed.num_patches,
        vit.embed_dim,
        len(model.plan),
        head_blocks,
    )
    return speed, there


def _seconds(model: MultitaskViT, data: TaskData, transforms: ImageTransforms, runtime: Runtime, batch: int) -> float:
    began = time.monotonic()
    split_features(lambda x: model.features(model.forward_features(x)[0]), data, "train", transforms, runtime, batch)
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    return time.monotonic() - began
