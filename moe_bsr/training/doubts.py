"""Warnings about valid settings that are likely to spoil a run, given before it starts.

The configuration (`config/schema.py`) refuses settings that can never be right. The settings warned about here may be
intended but are usually mistakes: a learning rate for another optimizer, a warm-up as long as the run, a task that gets
almost no updates.
"""

from collections.abc import Iterator

from moe_bsr.config import Config
from moe_bsr.data.sampler import MultitaskSampler
from moe_bsr.model.storage import STORAGES
from moe_bsr.runtime import memory
from moe_bsr.runtime.top_list import condensed
from moe_bsr.training.length import in_updates, updates_of
from moe_bsr.training.optim import learning_rate

LEAST_SHARE = 0.02  # share of the updates below which a task gets a warning
LARGEST_RATE = {"adamw": 0.1, "adamw8": 0.1, "sgd": 10.0, "mezo": 10.0}


def doubts(config: Config, sizes: dict[str, int]) -> list[str]:
    """Return one line for each doubtful setting.

    Args:
        sizes: number of training images by task.
    """
    if config.train.optimizer == "lbfgs":
        return list(_learning_signal(config))
    steps = updates_of(config, sizes)
    if steps is None:  # train.minutes: the number of updates is measured later
        return [*_learning_signal(config), *_storage(config)]
    config = in_updates(config, steps)
    found = [*_optimization(config), *_learning_signal(config), *_storage(config), *_data(config, sizes)]
    return condensed(found, sizes)


def _optimization(config: Config) -> Iterator[str]:
    train = config.train
    rates = [learning_rate(train, step) for step in range(0, train.steps, max(1, train.steps // 1000))]
    mean_rate, highest = sum(rates) / len(rates), train.lr * max(1.0, train.head_lr_scale)
    if highest > LARGEST_RATE[train.optimizer]:
        yield (
            f"train.lr = {train.lr:g} (heads: x {train.head_lr_scale:g}) is very large for {train.optimizer}; "
            f"usual rates are at most {LARGEST_RATE[train.optimizer]:g}"
        )
    if train.optimizer in ("adamw", "adamw8") and (moved := mean_rate * train.steps) < 1e-4:
        yield (
            f"train.lr = {train.lr:g} moves a weight by at most {moved:.1g} in {train.steps} updates: hardly anything "
            "will be learned"
        )
    warmup = train.warmup_steps
    warmup = round(train.warmup_fraction * train.steps) if warmup is None else warmup
    if train.steps > 1 and warmup > train.steps / 2:
        yield f"train.warmup_steps or warmup_fraction: the learning rate rises in {warmup} of {train.steps} updates"
    left = (1 - mean_rate * train.weight_decay) ** train.steps
    if left < 0.1:
        yield f"train.weight_decay = {train.weight_decay:g} alone shrinks the weights to {left:.1%} by the end"
    if train.optimizer == "sgd" and 1 / (1 - train.momentum) > train.steps:
        yield f"train.momentum = {train.momentum:g} averages over more updates than the {train.steps} of this run"
    if train.grad_clip_norm is not None and train.grad_clip_norm < 1e-3:
        yield f"train.grad_clip_norm = {train.grad_clip_norm:g} scales nearly every gradient down to almost nothing"
    if train.layer_decay < 0.3:
        left = f"{train.layer_decay**4:.1g}"
        yield f"train.layer_decay = {train.layer_decay:g}: the rate four blocks below is {left} times the upper one"
    if train.ema_decay is not None and (reached := train.steps / (9 + train.steps)) < train.ema_decay:
        needed = (10 * train.ema_decay - 1) / (1 - train.ema_decay)
        yield (
            f"train.ema_decay = {train.ema_decay:g} takes {needed:,.0f} updates to reach; after {train.steps} it is "
            f"{reached:.4g}"
        )


def _learning_signal(config: Config) -> Iterator[str]:
    train, moe = config.train, config.moe
    if train.label_smoothing > 0.5:
        yield f"train.label_smoothing = {train.label_smoothing:g} leaves the right class less than half of the target"
    if config.backbone.weights == "random" and config.plan.train_blocks != "all":
        yield "backbone.weights = random with plan.train_blocks not all: the frozen blocks stay random"
    if (rate := min(config.plan.keep_rates.values(), default=1.0)) < 0.05:
        yield f"plan.keep_rate = {rate:g} keeps {rate:.2%} of the tokens at a block"
    if config.plan.moe_blocks:
        if moe.gate_noise > moe.num_experts:
            yield (
                f"moe.gate_noise = {moe.gate_noise:g} is noise of {moe.gate_noise / moe.num_experts:.3g} on router "
                "logits that start below 1: experts are chosen almost at random"
            )
        if moe.init_noise > 0.5:
            yield f"moe.init_noise = {moe.init_noise:g} drowns out the pretrained FFN that the experts are copied from"
        if moe.balance_loss != "none" and moe.balance_loss_weight > 1:
            yield f"moe.balance_loss_weight = {moe.balance_loss_weight:g} outweighs the loss of the tasks"
    if (crop := config.data.crop_scale) is not None and crop[1] < 0.05:
        yield f"data.crop_scale = {crop}: training sees at most {crop[1]:.1%} of an image"
    if train.class_weights == config.sampler.classes == "balanced":
        yield "train.class_weights and sampler.classes are both balanced: small classes count twice; take one of them"
    weights = {task: train.task_weights.get(task, 1.0) for task in config.trained_tasks()}
    mean = sum(weights.values()) / len(weights)
    for task, weight in weights.items():
        if weight < 0.01 * mean:
            yield f"train.task_weights: {task} counts {weight / mean:.1g} of the mean task"


def _storage(config: Config) -> Iterator[str]:
    entries = config.storage if isinstance(config.storage, list) else [config.storage]
    plain = ({k: v for k, v in e.items() if k != "blocks"} if isinstance(e, dict) else e for e in entries)
    folders = (choice.options.place for choice in map(STORAGES.choose, plain) if choice.kind == "offload")
    for folder in dict.fromkeys(filter(memory.holds, folders)):
        yield f"storage = offload writes to {folder}, which is in memory (tmpfs); set storage.folder to one on a disk"


def _data(config: Config, sizes: dict[str, int]) -> Iterator[str]:
    train = config.train
    for task, size in sizes.items():
        if train.batch_size > size:
            yield (
                f"train.batch_size = {train.batch_size}, but {task} has {size} training images: each is used "
                f"{train.batch_size / size:.3g} times in an update; take at most {size}"
            )
    runs = [sizes] if config.mode == "multitask" else [{task: size} for task, size in sizes.items()]
    for run in runs:
        sampler = MultitaskSampler(run, train.batch_size, train.steps, config.sampler, config.seed)
        for task, counts in sampler.progress(train.steps).items():
            share = counts["updates"] / train.steps
            if share < min(LEAST_SHARE, 0.5 / len(run)):
                yield (
                    f"sampler.kind = {config.sampler.kind}: {task} gets {counts['updates']} of {train.steps} updates "
                    f"({share:.1%}), {counts['epochs']:.2g} epochs of its {sizes[task]} images"
                )
