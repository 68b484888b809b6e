"""Compare predicted with measured cost, for one configuration and in sweeps over plans, precisions and storages."""

import copy
import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from moe_bsr import config as configuration
from moe_bsr.benchmark.measure import Measured, measure
from moe_bsr.config import Config
from moe_bsr.cost.predict import Cost, predict
from moe_bsr.model.backbones import family_of
from moe_bsr.model.multitask import MultitaskViT, Output
from moe_bsr.model.storage import STORAGES
from moe_bsr.runtime.device import prepare
from moe_bsr.training.update import training_step

TOLERANCES = {"parameters": 0.0, "gradients": 0.0, "optimizer": 0.0, "kept": 0.02, "peak": 0.03}


def plans(depth: int) -> dict[str, dict[str, Any]]:
    """Return the six plans for a depth, as keys of `plan`. At depth 12, BSR is the paper's 3, 7, 11 / 3, 6, 9."""
    trained = [depth // 4, 7 * depth // 12, depth - 1]
    drops = [depth // 4, depth // 2, 3 * depth // 4]
    none = {"drop_blocks": [], "moe_blocks": [], "keep_rate": 0.5}
    return {
        "full": none | {"train_blocks": "all"},
        "last": none | {"train_blocks": []},
        "last-k": none | {"train_blocks": list(range(depth - depth // 4, depth))},
        "bsr": none | {"train_blocks": trained, "drop_blocks": drops},
        "moe": none | {"train_blocks": "all", "moe_blocks": trained},
        "moe-bsr": none | {"train_blocks": trained, "drop_blocks": drops, "moe_blocks": trained},
    }


def run(
    config: Config,
    classes: dict[str, int],
    *,
    batch: int,
    vit: nn.Module | None = None,
    micro_batches: int = 1,
) -> tuple[Cost, Measured]:
    """Predict and measure a step of the task with the most classes, with random weights.

    A step's allocations depend only on shapes, except for the sizes of the experts' groups. The largest group of each
    layer is taken from the measured step.

    Args:
        batch: images of a micro-batch.
        vit: a backbone made earlier, of which a copy is used; None: make one.
        micro_batches: if above 1, a whole update with this many micro-batches of one task is measured. It must be the
            number that the configuration has.
    """
    if vit is None:
        vit = random_backbone(config)
    runtime = prepare(config.runtime)
    model = MultitaskViT(copy.deepcopy(vit), config, classes)
    task = max(classes, key=classes.get)
    step = training_step(runtime.place(model), config, runtime, batch=batch, task=task)
    shares: dict[int, float] = {}

    def note_shares(_, __, output: Output) -> None:
        for index, routing in output.routing.items():
            load = routing.load.detach()
            shares[index] = float(load.max() / load.mean())

    with model.register_forward_hook(note_shares), runtime.in_effect():
        seen = measure(step, micro_batches)  # the last forward pass belongs to the traced step
    about = {"batch": batch, "precision": runtime.precision, "task": task, "shares": shares}
    return predict(model, config, **about, all_tasks=micro_batches > 1), seen


def random_backbone(config: Config) -> Any:
    return family_of(config.backbone).load(dataclasses.replace(config.backbone, weights="random"), 0)


def compare(cost: Cost, seen: Measured) -> dict[str, dict[str, float]]:
    """Return {quantity: {"predicted", "measured", "difference" (relative to the measured)}}, in bytes.

    "peak" is relative to the start of the step and includes gradients. "PHASE, without gradients" is the peak of one
    phase without them.
    """
    before = cost.parameters + cost.optimizer + cost.average
    pairs = {
        "parameters": (cost.parameters, seen.parameters + seen.buffers),
        "gradients": (cost.gradients, seen.gradients),
        "optimizer": (cost.optimizer, seen.optimizer),
        "kept": (cost.kept, seen.kept),
        "peak": (cost.peak - before, max(seen.peaks.values())),
    }
    pairs |= {
        f"{phase}, without gradients": (cost.transients[phase], seen.transients[phase]) for phase in seen.transients
    }
    return {
        name: {"predicted": a, "measured": b, "difference": (a - b) / b if b else float(a != 0)}
        for name, (a, b) in pairs.items()
    }


def compare_blocks(cost: Cost, seen: Measured) -> dict[str, dict[str, int]]:
    """Return {section: {"predicted", "measured"}}: bytes kept for the backward pass."""
    sections = list(dict.fromkeys([*cost.kept_by_block, *seen.kept_by_block]))
    return {
        name: {"predicted": sum(cost.kept_by_block.get(name, {}).values()), "measured": seen.kept_by_block.get(name, 0)}
        for name in sections
    }


def sweep(
    config: Config,
    classes: dict[str, int],
    *,
    backbones: list[str],
    image_size: int | None,
    batches: list[int],
    storages: list[str] | None = None,
    precisions: Sequence[str] = ("fp32", "bf16"),
) -> Iterator[dict[str, Any]]:
    """Yield one record for each backbone x plan x precision x batch x storage. `config` sets everything else."""
    for name in backbones:
        config = configuration.replace(
            config,
            backbone__name=name,
            backbone__image_size=image_size,
            plan__train_blocks=[],
            plan__drop_blocks=[],
            plan__moe_blocks=[],
        )
        vit = random_backbone(config)
        grid = itertools.product(precisions, batches, storages or list(STORAGES), plans(len(vit.blocks)).items())
        for precision, batch, storage, (plan, keys) in grid:
            changed = configuration.replace(
                config,
                runtime__precision=precision,
                storage=storage,
                **{f"plan__{key}": value for key, value in keys.items()},
            )
            cost, seen = run(changed, classes, batch=batch, vit=vit)
            yield {
                "backbone": name,
                "plan": plan,
                "precision": precision,
                "batch": batch,
                "storage": storage,
                "quantities": compare(cost, seen),
            }


def summary(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, by quantity, the worst and the median absolute relative difference, and where the worst occurred."""
    result = {}
    for quantity in records[0]["quantities"]:
        sizes = [abs(r["quantities"][quantity]["difference"]) for r in records]
        worst = max(range(len(sizes)), key=sizes.__getitem__)
        where = {k: v for k, v in records[worst].items() if k != "quantities"}
        result[quantity] = {"worst": sizes[worst], "median": statistics.median(sizes), "at": where}
    return result
