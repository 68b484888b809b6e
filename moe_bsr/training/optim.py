"""The optimizer, its schedule and the moving average of the weights."""

import math
import re

import torch
from torch import Tensor, nn

from moe_bsr.config import TrainConfig

NO_DECAY = ("pos_embed", "cls_token", "reg_token", "bias")


def parameter_groups(model: nn.Module, config: TrainConfig, depth: int) -> list[dict]:
    """Trained parameters by learning-rate scale and weight decay; frozen ones are in no group.

    Layer-wise decay as in BEiT and MAE: embeddings 0, block i is i + 1, and experts belong to their block;
    routers, final norm and heads learn at full rate. No decay for biases, norms, positions and tokens.
    """
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = config.layer_decay ** (depth + 1 - layer_of(name, depth))
        if name.startswith("heads."):
            scale *= config.head_lr_scale
        decays = parameter.ndim > 1 and not name.endswith(NO_DECAY)
        decay = config.weight_decay if decays else 0.0
        group = groups.setdefault(
            (scale, decay),
            {"params": [], "names": [], "lr": config.lr * scale, "lr_scale": scale, "weight_decay": decay},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def layer_of(name: str, depth: int) -> int:
    """Layer number of a parameter for layer-wise decay: 0 the embeddings, depth + 1 the top."""
    block = re.match(r"vit\.blocks\.(\d+)\.", name)
    if block and ".router." not in name:
        return int(block[1]) + 1
    below = name.startswith(("vit.patch_embed", "vit.pos_embed", "vit.cls_token", "vit.reg_token", "vit.norm_pre"))
    return 0 if below else depth + 1


def make_optimizer(model: nn.Module, config: TrainConfig, depth: int) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config, depth)
    if config.optimizer == "sgd":
        # Not fused: that one fails where some parameters have momentum and others are new (another task).
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then cosine towards min_lr."""
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_fraction * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(parameters: list[nn.Parameter], limit: float | None) -> float:
    """The norm of all their gradients, which are scaled down to `limit` if it is larger.

    Not `clip_grad_norm_`: that multiplies every gradient by 1 where there is nothing to clip.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    value = float(norm)
    if limit is not None and value > limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return value


class MovingAverage:
    """Exponential moving average of the trained parameters, in float32; frozen ones need none."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        live = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.average.values()), [live[n] for n in self.average], 1 - self.decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the average with the live weights; a second call exchanges them back."""
        for name, parameter in model.named_parameters():
            if name in self.average:
                held: Tensor = self.average[name]
                live = parameter.detach().clone()
                parameter.copy_(held)
                held.copy_(live)
