"""Measure a method's cost in a model of one task: predicted and measured memory, and time in turn with a reference.

Weights and images are random, except in `fidelity`, which compares gradients of real images.
"""

import gc
import statistics
import time
from typing import Any

import torch

from moe_bsr.benchmark import cost_check, gradients
from moe_bsr.benchmark.cases import plain_step
from moe_bsr.benchmark.matmuls import step_products
from moe_bsr.benchmark.measure import Measured, measure, trace
from moe_bsr.config import Config, replace
from moe_bsr.config.methods import Method
from moe_bsr.config.registry import Choice
from moe_bsr.cost.predict import Cost, predict
from moe_bsr.evaluation.features import Features
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.storage import STORAGES
from moe_bsr.runtime.device import prepare
from moe_bsr.training import linear_probe
from moe_bsr.training.update import TrainingStep, random_batch, training_step

SOLVED = 1000  # images whose features a probe is solved on, to measure its memory
Sizes = dict[str, dict[str, float | None]]


def cost(method: Method, base: Config, classes: int) -> dict[str, Any]:
    """Return bytes, parameters and FLOPs of training one task with `classes` classes.

    Returns:
        parameters, trained_parameters, gradient_bytes, optimizer_bytes.
        task_bytes: size of what one more task adds to the model.
        step_flops: training FLOPs per image.
        kept_bytes: saved for the backward pass, per image, copies of weights included.
        peak_bytes: of a whole update, with weights and everything else but the images.
        The last two are {"predicted", "measured"} in bytes; predicted is None for plain timm code.
    """
    if method.code == "timm":
        return _plain_cost(base, classes)
    config, task = _of_one_task(method.of(base))
    if method.code == "probe":
        return _probe_cost(config, task, classes)
    parts = config.train.grad_accumulation_steps
    batch = config.train.batch_size // parts
    predicted, seen = cost_check.run(config, {task: classes}, batch=batch, micro_batches=parts)
    model = MultitaskViT(cost_check.random_backbone(config), config, {task: classes})
    own = model.own_parameters(task) if base.mode == "multitask" else [p for p in model.parameters() if p.requires_grad]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "gradient_bytes": predicted.gradients,
        "optimizer_bytes": seen.optimizer,
        "task_bytes": sum(p.numel() * p.element_size() for p in own),
        "step_flops": predicted.step_flops / batch,
        **_sizes(predicted, seen, batch),
    }


def _sizes(predicted: Cost | None, seen: Measured, batch: int) -> Sizes:
    """Both sizes leave out the moving average of the weights, which a measured step does not have."""
    peak = seen.parameters + seen.buffers + seen.optimizer + max(seen.peaks.values())
    return {
        "kept_bytes": {"predicted": predicted and predicted.kept / batch, "measured": seen.kept / batch},
        "peak_bytes": {"predicted": predicted and predicted.peak - predicted.average, "measured": peak},
    }


def _probe_cost(config: Config, task: str, classes: int) -> dict[str, Any]:
    """Cost of computing the features of `SOLVED` images and solving for a head."""
    runtime, batch = prepare(config.runtime), config.train.batch_size
    model = runtime.place(MultitaskViT(cost_check.random_backbone(config), config, {task: classes})).eval()
    images, _ = random_batch(batch, model.image_size, classes, runtime.device)
    labels, made = torch.arange(SOLVED) % classes, []

    def compute() -> None:
        with torch.inference_mode(), runtime.autocast():
            for _ in range(0, SOLVED, batch):
                tokens, _ = model.forward_features(images, task, upto=len(model.plan))
                made.append(model.features(tokens).cpu())

    def solve() -> None:
        x = torch.cat(made)[:SOLVED]
        made.clear()
        linear_probe.fit(Features(x, labels), Features(x[:1], labels[:1]), classes, penalty=1.0)

    with runtime.in_effect():
        peak = trace({"features": compute, "solve": solve}, runtime.device).peak()
    updates = replace(config, train__optimizer="adamw")  # its forward pass, and a backward pass of the head alone
    head = model.heads[task]
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    features = {"predicted": None, "measured": 4.0 * head.in_features}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in head.parameters()),
        "gradient_bytes": 0,
        "optimizer_bytes": 0,
        "task_bytes": sum(p.numel() * p.element_size() for p in head.parameters()),
        "step_flops": predict(model, updates, batch=batch, precision=runtime.precision, task=task).step_flops / batch,
        "kept_bytes": features,
        "peak_bytes": {"predicted": None, "measured": held + peak},
    }


def _plain_cost(base: Config, classes: int) -> dict[str, Any]:
    step, batch = _plain_step(base, classes), base.train.batch_size
    seen, every = measure(step), sum(p.numel() for p in step.model.parameters())
    head = sum(p.numel() for p in step.model.get_classifier().parameters())
    return {
        "parameters": every,
        "trained_parameters": every,
        "gradient_bytes": seen.gradients,
        "optimizer_bytes": seen.optimizer,
        "task_bytes": 4 * (head if base.mode == "multitask" else every),
        "step_flops": sum(product.flops * times for product, times in step_products(step).items()) / batch,
        **_sizes(None, seen, batch),
    }


def _plain_step(base: Config, classes: int) -> TrainingStep:
    """timm's own network in the simplest training loop."""
    runtime, model = prepare(base.runtime), cost_check.random_backbone(base)
    model.reset_classifier(classes)
    return plain_step(model, runtime, base.train.batch_size, model.patch_embed.img_size[0], classes)


def times(method: Method, reference: Method, base: Config, classes: int, rounds: int) -> dict[str, float] | None:
    """Return the median seconds of a whole update of the method and of the reference, timed in turn.

    None for a probe, which has no updates.
    """
    if method.code == "probe":
        return None
    steps = [_timed_step(each, base, classes) for each in (method, reference)]
    runtime = prepare(base.runtime)
    seconds: list[list[float]] = [[], []]
    with runtime.in_effect():
        for turn in range(rounds + 1):  # the first one warms up
            for place in (0, 1) if turn % 2 else (1, 0):
                began = time.perf_counter()
                _update(*steps[place])
                if runtime.device.type == "cuda":
                    torch.cuda.synchronize(runtime.device)
                if turn:
                    seconds[place].append(time.perf_counter() - began)
    own, other = map(statistics.median, seconds)
    return {"seconds": own, "reference_seconds": other, "ratio": own / other}


def _timed_step(method: Method, base: Config, classes: int) -> tuple[TrainingStep, int]:
    if method.code == "timm":
        return _plain_step(base, classes), 1
    config, task = _of_one_task(method.of(base))
    parts = config.train.grad_accumulation_steps
    runtime = prepare(config.runtime)
    model = runtime.place(MultitaskViT(cost_check.random_backbone(config), config, {task: classes}))
    return training_step(model, config, runtime, batch=config.train.batch_size // parts), parts


def _update(step: TrainingStep, micro_batches: int) -> None:
    for _ in range(micro_batches):
        step.forward()
        step.backward()
    step.step()
    step.clear()


def fidelity(method: Method, base: Config) -> dict[str, float] | None:
    """Compare the method's gradients on a batch of real images with those of the same plan under exact storage.

    Returns:
        cosine, error and norm as in `gradients.Row`. None for plain code, for storages that differ by block, and for
        probes and other methods without gradients.
    """
    config, _ = _of_one_task(method.of(base))
    if method.code != "ours" or isinstance(config.storage, list) or not config.train.differentiates:
        return None
    storage = STORAGES.choose(config.storage)
    if storage.kind == "exact":
        return {"cosine": 1.0, "error": 0.0, "norm": 1.0}
    changes = {"train__grad_accumulation_steps": 1, "train__step_in_backward": False, "storage": "exact"}
    config = replace(config, **changes)
    runtime = prepare(config.runtime)
    with runtime.in_effect():
        batch, model = gradients.prepare(config, runtime)
        row = gradients.compare(config, runtime, model, batch, [Choice("exact"), storage], 0)[1]
    return {"cosine": row.cosine, "error": row.error, "norm": row.norm}


def _of_one_task(config: Config) -> tuple[Config, str]:
    """Return the configuration for its first task, and the task's name."""
    task = config.task_names()[0]
    gc.collect()  # free the models of the previous method
    return config.of_task(task), task
