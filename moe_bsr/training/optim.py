"""Optimizer, parameter groups, learning-rate schedule, gradient clipping and the moving average of the weights."""

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from moe_bsr.config import TrainConfig
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.training.adamw8 import AdamW8, layout

GroupOf = Callable[[nn.Parameter], Hashable]


def parameter_groups(model: MultitaskViT, config: TrainConfig) -> list[dict]:
    """Group the trained parameters by learning-rate scale, weight decay and hold. Frozen ones are in no group.

    Layer-wise decay is as in BEiT and MAE: the embeddings are layer 0, block i with its experts is layer i + 1, and
    routers, final norm, heads and log variances train at the full rate. Biases, norms, position embeddings and class
    and register tokens have no weight decay. A group's "hold" is the number of first updates in which it does not move.
    """
    groups: dict[tuple, dict] = {}
    top = len(model.plan) + 1
    scales, layers = _scales(model, config), model.layers()
    routers = {id(p) for moe in model.mixtures() for p in moe.router.parameters()}
    undecayed = _undecayed(model) | _undecayed_experts(model, config)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = config.layer_decay ** (top - layers[id(parameter)])
        scale *= scales.get(id(parameter), 1.0)
        decay = 0.0 if id(parameter) in undecayed else config.weight_decay
        hold = config.router_hold if id(parameter) in routers else 0
        settings = {"lr": config.lr * scale, "lr_scale": scale, "weight_decay": decay, "hold": hold}
        group = groups.setdefault(tuple(settings.values()), {"params": [], "names": [], **settings})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def names_of(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, str]:
    """Return the name of each trained parameter, from the optimizer's groups (see `parameter_groups`)."""
    return {p: n for group in optimizer.param_groups for p, n in zip(group["params"], group["names"], strict=True)}


def _scales(model: MultitaskViT, config: TrainConfig) -> dict[int, float]:
    """Return the rates of heads, log variances, experts and routers relative to their layer's rate, by parameter id."""
    scaled = [(part, config.head_lr_scale) for part in (model.heads, model.log_variances)]
    for moe in model.mixtures():
        own = moe.experts.LR_SCALE if config.expert_lr_scale is None else config.expert_lr_scale
        scaled += [(moe.experts, own), (moe.router, config.router_lr_scale)]
    return {id(p): scale for part, scale in scaled for p in part.parameters()}


def _undecayed_experts(model: MultitaskViT, config: TrainConfig) -> set[int]:
    """Return the ids of the experts' parameters that do not decay towards zero."""
    all_experts = [moe.experts for moe in model.mixtures()]
    to_zero = [e for e in all_experts if config.expert_decay == "zero" or config.expert_decay is None and e.DECAYS]
    return {id(p) for experts in all_experts if experts not in to_zero for p in experts.parameters()}


def _decay_towards_mean(model: MultitaskViT, config: TrainConfig, optimizer: torch.optim.Optimizer) -> None:
    """Register a hook that, before each step, moves experts towards the mean of those copied from the same units."""
    slices = {id(p): moe.experts.slices for moe in model.mixtures() for p in moe.experts.parameters()}
    undecayed = _undecayed(model)

    @torch.no_grad()
    def decay(*_: object) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) in slices and id(p) not in undecayed:
                    for first in range(slices[id(p)]):  # experts of one slice; slices may have different numbers
                        copies = p[first :: slices[id(p)]]
                        copies.lerp_(copies.mean(0, keepdim=True).expand_as(copies), group["lr"] * config.weight_decay)

    optimizer.register_step_pre_hook(decay)


def _undecayed(model: MultitaskViT) -> set[int]:
    """Return the ids of the parameters without weight decay."""
    # Parameters that belong to the backbone itself and to none of its modules: positions, class and register tokens.
    found = {id(p) for p in model.vit.parameters(recurse=False)}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            of_tasks = isinstance(module, nn.ParameterDict)  # whose keys are names of tasks
            if parameter.ndim <= 1 or (name.endswith("bias") and not of_tasks):  # biases of experts are stacked: (E, D)
                found.add(id(parameter))
    return found


def make_optimizer(model: MultitaskViT, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a run. For "lbfgs" and "mezo", its `step` is never called."""
    optimizer = optimizer_of(parameter_groups(model, config), config)
    if config.expert_decay == "mean" and config.weight_decay:
        _decay_towards_mean(model, config, optimizer)
    return optimizer


def optimizer_of(groups: list[dict], config: TrainConfig) -> torch.optim.Optimizer:
    """Return an optimizer of the run's kind for these parameter groups."""
    if config.optimizer in ("lbfgs", "mezo"):  # holds the groups only
        return torch.optim.SGD(groups, lr=config.lr)
    if config.optimizer == "sgd":
        # Not fused: that one fails where some parameters have momentum and others are new (another task).
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    if config.optimizer == "adamw8":
        return AdamW8(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the optimizer state of a parameter after its first step, as meta tensors of the right shapes and types."""
    if isinstance(optimizer, AdamW8):
        return dict(layout(parameter))
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step": torch.empty((), device="meta"), "exp_avg": whole, "exp_avg_sq": whole}
    return {"momentum_buffer": whole} if optimizer.defaults["momentum"] else {}


DECAY_SHARE = 0.2  # share of the updates over which constant_then_decay decays


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of update `step` (from 0): linear warm-up, then the schedule towards min_lr.

    It depends only on the step and the length of the run. If a resumed run gets more steps, it continues at the rate
    that the longer schedule has at that step.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_fraction * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant_then_decay":
        decay = max(1, min(round(DECAY_SHARE * config.steps), config.steps - warmup))
        return config.lr - (config.lr - config.min_lr) * max(0.0, (step + decay - config.steps) / decay)
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def clip_groups(model: MultitaskViT, config: TrainConfig) -> GroupOf | None:
    """Return the function that maps parameters to groups for `train.grad_clip_per`; None if all are one group.

    The groups per block are the embedding, each block with its experts, routers and adapters, and everything after the
    blocks.
    """
    if config.grad_clip_per == "model":
        return None
    if config.grad_clip_per == "parameter":
        return id
    groups = model.layers()
    for index, layer in enumerate(model.vit.blocks):  # the layer of a router is the top
        groups |= {id(parameter): index + 1 for parameter in layer.parameters()}
    return lambda parameter: groups[id(parameter)]


def clip_gradients(parameters: list[nn.Parameter], limit: float | None, group_of: GroupOf | None = None) -> float:
    """Clip the gradients of these parameters, and return their global norm before clipping.

    Unlike `clip_grad_norm_`, this does not multiply every gradient by 1 if there is nothing to clip.

    Args:
        limit: largest norm. None or inf: clip nothing.
        group_of: maps parameters to groups, each of which is clipped by its own norm; None: all are one group.
    """
    if group_of is not None and limit is not None and limit < math.inf:
        groups: dict[Hashable, list[nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault(group_of(parameter), []).append(parameter)
        return float(nn.utils.get_total_norm([nn.utils.clip_grad_norm_(each, limit) for each in groups.values()]))
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    value = float(norm)
    if limit is not None and value > limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return value


class MovingAverage:
    """Exponential moving average of the trained parameters, in float32.

    After t updates the decay is min(`decay`, (1 + t) / (10 + t)). Otherwise the average of a short run would mostly
    consist of its initial weights.

    Attributes:
        average: tensors by parameter name.
        updates: number of updates so far; restore it together with the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.average = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        live = dict(model.named_parameters())
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), [live[n] for n in self.average], 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the average with the model's weights. A second call exchanges them back."""
        for name, parameter in model.named_parameters():
            if name in self.average:
                held = self.average[name]
                live = parameter.detach().clone()
                parameter.copy_(held)
                held.copy_(live)
