"""What this machine and these data are: seconds of a forward pass, images, and the memory there is."""

import dataclasses
import time
from dataclasses import dataclass

import torch

from moe_bsr.config import Config
from moe_bsr.cost.predict import predict
from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.evaluation.features import split_features
from moe_bsr.fit import rungs
from moe_bsr.fit.room import SPARE, Memory, fitted
from moe_bsr.model.multitask import MultitaskViT, build
from moe_bsr.runs import folder as run
from moe_bsr.runtime import memory
from moe_bsr.runtime.device import Runtime

IMAGES = 128  # of all tasks together at most, from which the speed is taken
FOR_IMAGES = 0.03  # of the time, in which these are seen
FIRST = 8  # of each task: from them it is known how many more there is time for
EVALUATED = 64  # images at once in an evaluation


@dataclass(slots=True)
class Speed:
    """Attributes:
    forward: seconds for the frozen backbone on one image, read and decoded.
    opening: seconds that opening the tasks and building a model took, as every run does.
    images: for training, by task. decoded: bytes of all images for training and validation.
    """

    forward: float
    opening: float
    images: dict[str, int]
    classes: dict[str, int]
    decoded: int
    tokens: int
    width: int
    depth: int
    has_class_token: bool


def measure(config: Config, runtime: Runtime, limit: int | None, seconds: float) -> tuple[Speed, Memory]:
    """Open the tasks, and let the frozen backbone see some images of each.

    Args:
        limit: bytes that the process may take; None: nine tenths of what is free.
        seconds: that there are for everything.
    Raises:
        ConfigError: not even the heads alone fit into the memory.
    """
    began = time.monotonic()
    tasks = {name: run.open_task(config, file) for name, file in config.task_files().items()}
    classes = {name: len(data.class_names) for name, data in tasks.items()}
    heads = rungs.start(config)
    model = runtime.place(build(heads, classes)).eval()
    transforms = run.make_transforms(config, model)
    opening = time.monotonic() - began
    resident = memory.resident()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    resident = parameters if runtime.device.type == "cuda" else resident
    evaluation = predict(model, heads, batch=EVALUATED, precision=runtime.precision).transients["forward"]
    reason = "asked for"
    if limit is None:
        free = memory.available(runtime.device)
        limit = resident + int(0.9 * free[0]) if free else 2**62
        reason = f"nine tenths of what {free[1]} has free" if free else "no limit is known"
    base = max(0, resident - parameters) + (0 if runtime.device.type == "cuda" else SPARE)
    there = Memory(limit, base, evaluation, reason)
    probe = rungs.probe(config, len(model.plan), model.vit.has_class_token)
    # What does not fit at all is refused before anything takes long.
    fitted(probe, classes, there, runtime.precision, 0)
    most = max(1, IMAGES // len(tasks))
    forward, decoded = 0.0, 0
    for data in tasks.values():
        part, start, count = data, 0, min(FIRST, most)
        # The second time is taken: kernels are chosen by then. Of images not read before: those are kept decoded.
        for _ in range(2):
            part = _some(data, start, count)
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
        vit.has_class_token,
    )
    return speed, there


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
