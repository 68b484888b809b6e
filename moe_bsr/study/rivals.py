"""Baselines without this package: timm's network, one head per task, AdamW and a cosine schedule.

Either the whole network trains, or LoRA adapters from peft do. Images, splits and crops are the same as in our runs.
The rest is a plain training loop that takes the tasks in turn, without our kernels, storages and caches. It clips the
norm of the whole gradient, whatever `train.grad_clip_per` is.
"""

import itertools
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moe_bsr.config import Config, ConfigError
from moe_bsr.data import ImageTransforms, TaskData
from moe_bsr.model.backbones import family_of, require_tokens
from moe_bsr.runtime.device import Runtime
from moe_bsr.runtime.rng import key, stream

RATES = {"timm_full": 1.0, "timm_lora": 2.0}  # factors on train.lr. Heads have train.head_lr_scale on top.
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["qkv", "proj", "fc1", "fc2"]}  # all linear layers of the blocks
WARMUP = 0.05  # share of the training time


def train(
    method: str,
    config: Config,
    tasks: dict[str, TaskData],
    transforms: ImageTransforms,
    runtime: Runtime,
    seconds: float,
    most: int | None = None,
) -> tuple[nn.Module, nn.ModuleDict, int]:
    """Train for `seconds`, but for one update at least, with a cosine learning-rate schedule of that length.

    Args:
        method: a key of RATES. config: its backbone, batch size, learning rates, weight decay, clipping and seed are
            used.
        most: length in updates; replaces `seconds`.

    Returns:
        The network, which returns (B, D) features, the heads by task, and the number of updates.

    Raises:
        ConfigError: timm_lora without peft, or a backbone without tokens.
    """
    require_tokens(config.backbone, "the comparison with plain timm")
    began = time.monotonic()
    network: nn.Module = family_of(config.backbone).load(config.backbone, config.seed)
    network.reset_classifier(0)
    heads = nn.ModuleDict({name: nn.Linear(network.num_features, len(d.class_names)) for name, d in tasks.items()})
    if method == "timm_lora":
        network = _with_lora(network)
    network, heads, rate = network.to(runtime.device), heads.to(runtime.device), RATES[method] * config.train.lr
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": trained, "scale": 1.0},
        {"params": list(heads.parameters()), "scale": config.train.head_lr_scale},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=config.train.weight_decay)
    names, batches, updates = list(tasks), {name: _batches(data, config) for name, data in tasks.items()}, 0
    network.train()
    seconds = max(seconds, 1e-3)  # or a time that is over already would never end
    while (progress := (time.monotonic() - began) / seconds if most is None else updates / most) < 1 or not updates:
        progress = min(progress, 1.0)
        factor = min(1.0, progress / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor * group["scale"]
        name = names[updates % len(names)]
        images, labels = transforms.train_batch(tasks[name], *next(batches[name]))
        with runtime.autocast():
            logits = heads[name](network(transforms.normalize(images, device=runtime.device)))
        cross_entropy(logits.float(), labels.to(runtime.device)).backward()
        nn.utils.clip_grad_norm_([*trained, *heads.parameters()], config.train.grad_clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
    return network.eval(), heads, updates


def top1(
    network: nn.Module, heads: nn.ModuleDict, data: TaskData, split: str, transforms: ImageTransforms, runtime: Runtime
) -> float:
    """Return the top-1 accuracy on a split in percent."""
    right = count = 0
    with torch.inference_mode(), runtime.autocast():
        for images, labels in transforms.eval_batches(data, split, 64):
            logits = heads[data.name](network(transforms.normalize(images, device=runtime.device)))
            right += int((logits.argmax(1).cpu() == labels).sum())
            count += len(labels)
    return 100 * right / count


def _with_lora(network: nn.Module) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("timm_lora needs peft: pip install peft") from error
    return get_peft_model(network, LoraConfig(**LORA))


def _batches(data: TaskData, config: Config) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the positions and epochs of each batch. An epoch has each image at most once, in full batches."""
    size, order = min(config.train.batch_size, len(data.train)), key(config.seed, data.name, "rival")
    for epoch in itertools.count():
        positions = stream(order, epoch).permutation(len(data.train))
        for start in range(0, len(positions) - size + 1, size):
            yield positions[start : start + size], np.full(size, epoch)
