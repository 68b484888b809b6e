"""Warm start: build a model with the weights of another run (`train.init_from`), as far as they fit by name.

Dense weights are put into the backbone before the plan is applied, so that new experts start as copies of the trained
FFN. Experts, routers and adapters are copied if the block has such parts of the same shapes. Of a head, the rows of
classes that both runs have are copied. Everything else is initialized as in any run.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from moe_bsr.config import Config, ConfigError
from moe_bsr.model.adapters import ADAPTERS
from moe_bsr.model.backbones.pretrained import digest
from moe_bsr.model.multitask import MultitaskViT, build, build_on_meta
from moe_bsr.model.plan import BlockPlan
from moe_bsr.model.routers import FixedGates
from moe_bsr.runs import archive, checkpoint, ordinary
from moe_bsr.runs.config_file import read_config
from moe_bsr.runs.folder import check_names
from moe_bsr.runs.load import read_named
from moe_bsr.runtime.top_list import are_many

SHOWN = 5  # names in a list in a message
COMPUTES = {  # settings that change what a model with the same weights computes
    "plan": ("drop_blocks", "keep_rate", "moe_blocks", "head_blocks"),
    "tokens": ("reduce", "fuse", "protect_fused", "rank_by"),
    "moe": ("experts", "num_experts", "top_k", "mlp_ratio", "rank", "gate", "router", "renormalize_gates"),
}


@dataclass(slots=True)
class Source:
    """The run that weights are taken from.

    Attributes:
        config: the run's configuration.
        plan: one row per block.
        classes: class names by task, in the order of the head's rows.
        weights: tensors by name; a moving average replaces the live weights.
    """

    run: Path
    step: int
    backbone_sha256: str
    config: Config
    plan: list[BlockPlan]
    classes: dict[str, list[str]]
    weights: dict[str, Tensor]


def build_from(run: str, config: Config, classes: dict[str, list[str]]) -> tuple[MultitaskViT, list[str]]:
    """Build the model of a configuration with the weights of a run's best checkpoint, as far as they fit.

    Args:
        run: run folder or zip file.
        classes: class names by task.
    Returns:
        The model, on the CPU in float32, and lines that say what was taken, what is new and what was left.
    Raises:
        ConfigError: this is no run, or it has another backbone. CheckpointError: its checkpoint is missing or damaged.
    """
    counts = {task: len(names) for task, names in classes.items()}
    try:
        with archive.opened(Path(run).expanduser()) as folder:
            source = _read(folder, list(classes))
    except ConfigError as error:
        raise ConfigError(f"train.init_from = {run!r}: {error}") from error
    target = build_on_meta(config, counts)
    if config.train.only is not None:
        _require_same(config, target.plan, source)
    both = enumerate(zip(target.plan, source.plan, strict=False))  # another depth means another backbone, refused below
    adapters = {i for i, (mine, theirs) in both if mine.adapter is not None and mine.adapter == theirs.adapter}
    replaced: set[str] = set()
    complete = target.unchanged_backbone_names() <= source.weights.keys()  # then the backbone does not matter

    def put_dense(vit: VisionTransformer, sha256: str) -> None:
        if sha256 != source.backbone_sha256 and not complete:
            raise ConfigError(
                f"train.init_from = {run!r}: trained from a backbone with sha256 {source.backbone_sha256[:12]}..., and "
                f"{config.backbone.name} ({config.backbone.weights}) has {sha256[:12]}...; only runs of one backbone, "
                "of one image size, fit each other"
            )
        dense = _dense(source, vit.state_dict(), adapters)
        replaced.update(f"vit.{name}" for name in dense)
        vit.load_state_dict(dense, strict=False)

    model = build(config, counts, put_dense, checked=True)
    model.replaced = {name for name in model.unchanged_backbone_names() if name.replace(".base.", ".") in replaced}
    parts = _put_parts(model, source, adapters)
    if config.train.only is not None:
        _put_tasks(model, source)
    heads = {task: _put_head(model, source, task, classes[task]) for task in classes if task in source.classes}
    model.init_from = {"run": run, "step": source.step, "sha256": digest(source.weights)}
    return model, [
        f"weights from {run}, step {source.step}",
        *_describe(model, source, classes, replaced, parts, heads),
    ]


def _read(run: Path, tasks: list[str]) -> Source:
    ordinary.check(run)
    config, resolved = read_config(run)
    if config.mode == "single_task":
        return _read_parts(run, [task for task in config.task_names() if task in tasks], tasks)
    saved = read_named(run, "best", config)
    classes = {task: about["classes"] for task, about in resolved["tasks"].items()}
    model = build_on_meta(config, {task: len(names) for task, names in classes.items()})
    check_names(model, saved.weights, saved.file.parent)
    saved.check(model, config.train.ema_decay is not None)
    weights = saved.weights | (saved.average or {})
    return Source(run, saved.step, resolved["backbone_sha256"], config, model.plan, classes, weights)


def _read_parts(run: Path, known: list[str], wanted: list[str]) -> Source:
    """Read a run with one model per task: the model of a single wanted task, or only the heads of several."""
    parts = [_read(run / task, [task]) for task in known if checkpoint.steps(run / task)]
    if not parts:
        raise ConfigError(f"{run} has no trained model of {', '.join(wanted)}")
    first = parts[0]
    if len(wanted) == 1:
        return first
    heads = {name: value for part in parts for name, value in part.weights.items() if name.startswith("heads.")}
    classes = {task: names for part in parts for task, names in part.classes.items()}
    step = max(part.step for part in parts)
    return Source(run, step, first.backbone_sha256, first.config, first.plan, classes, heads)


def _require_same(config: Config, plan: list[BlockPlan], source: Source) -> None:
    """Refuse train.only if this configuration computes something else than the source with the same weights."""
    pairs: dict[str, tuple[Any, Any]] = {}
    pairs["adapter"] = [block.adapter for block in plan], [block.adapter for block in source.plan]
    for section, keys in COMPUTES.items():
        mine, theirs = getattr(config, section), getattr(source.config, section)
        pairs |= {f"{section}.{key}": (getattr(mine, key), getattr(theirs, key)) for key in keys}
    here, there = pairs["plan.head_blocks"]
    pairs["plan.head_blocks"] = sorted(here), sorted(there)
    for key, (here, there) in pairs.items():
        if here != there and (config.plan.moe_blocks or not key.startswith("moe.")):
            raise ConfigError(
                f"train.only = {config.train.only}: {key} = {here!s:.80} here and {there!s:.80} in "
                f"{config.train.init_from}, so its other tasks could not stay unchanged: use its value, or leave "
                "train.only out"
            )


def _dense(source: Source, vit: dict[str, Tensor], adapters: set[int]) -> dict[str, Tensor]:
    """Return the source's dense weights that differ from the backbone's, by name in the plain backbone.

    LoRA updates and factors are merged into them, except in the blocks `adapters`, where the new model has the same
    adapter.

    Args:
        vit: state dict of the backbone.
    """
    dense = {}
    for name, value in source.weights.items():
        plain = name.removeprefix("vit.").replace(".base.", ".").replace(".mlp.shared.", ".mlp.")
        if name.startswith("vit.") and plain in vit and not torch.equal(vit[plain].to(value.dtype), value):
            dense[plain] = value.float()
    for index, plan in enumerate(source.plan):
        if plan.adapter is None or (merge := ADAPTERS[plan.adapter.kind].merged_weight) is None or index in adapters:
            continue
        for layer in plan.adapter.options.layers:
            place, name = f"vit.blocks.{index}.{layer}.", f"blocks.{index}.{layer}.weight"
            saved = {key.removeprefix(place): w for key, w in source.weights.items() if key.startswith(place)}
            if saved:  # none in a run of which only the heads are taken
                dense[name] = merge(plan.adapter.options, dense.get(name, vit[name]).float(), saved)
    return dense


def _block(name: str) -> int:
    return int(name.split(".")[2])  # vit.blocks.3.attn ...


@torch.no_grad()
def _put_parts(model: MultitaskViT, source: Source, adapters: set[int]) -> dict[str, list[int]]:
    """Copy experts, routers and adapters. Return the blocks in which each kind was copied."""
    state = model.state_dict()
    places = {id(p): index for index, parameters in model.adapter_parameters.items() for p in parameters}
    added = {name: places[id(p)] for name, p in model.named_parameters() if id(p) in places}
    taken: dict[str, list[int]] = {"experts": [], "routers": [], "adapters": []}
    for index, plan in enumerate(model.plan):
        place = f"vit.blocks.{index}."
        theirs = {name: value for name, value in source.weights.items() if name.startswith(place)}
        if index in adapters:
            taken["adapters"].append(index)
            for name in (name for name, block in added.items() if block == index):
                state[name].copy_(source.weights[name])
        experts = {name for name in state if name.startswith(f"{place}mlp.experts.")}
        if plan.moe and all(name in theirs and theirs[name].shape == state[name].shape for name in experts):
            taken["experts"].append(index)
            for name in experts:
                state[name].copy_(theirs[name])
            routers = {name for name in state if name.startswith(f"{place}mlp.router.")}
            fixed = isinstance(model.get_submodule(f"{place}mlp.router"), FixedGates)
            if fixed and model.trained_tasks is model.tasks:
                continue  # fixed gates are set by this configuration
            if sum(_put_router(name, state[name], theirs, model.tasks, source) for name in routers):
                taken["routers"].append(index)
    return taken


def _put_router(name: str, mine: Tensor, theirs: dict[str, Tensor], tasks: list[str], source: Source) -> bool:
    """Copy a parameter of a router if the source has it, and return whether it did.

    The input layer of a task-conditioned router has one column per task. These are copied by task.
    """
    if name not in theirs:
        return False
    value, before = theirs[name], list(source.classes)
    if name.endswith(".router.embed.0.weight"):  # (width, tasks)
        for task in tasks:
            if task in before:
                mine[:, tasks.index(task)] = value[:, before.index(task)]
        return True
    if value.shape == mine.shape:
        mine.copy_(value)
    return value.shape == mine.shape


@torch.no_grad()
def _put_tasks(model: MultitaskViT, source: Source) -> None:
    """For `train.only`: initialize the routing of each new task as the mean over the source's tasks.

    Also copy the experts' shares that the balance loss keeps for each task.
    """
    state, before = model.state_dict(), list(source.classes)
    new = [task for task in model.tasks if task not in before]
    for name, mine in state.items():
        place, _, task = name.rpartition(".")
        if place.endswith(".mlp.router.weight") and task in new:
            mine.copy_(torch.stack([source.weights[f"{place}.{each}"] for each in before]).mean(0))
        elif name.endswith(".router.embed.0.weight"):
            mine[:, [model.tasks.index(task) for task in new]] = source.weights[name].mean(1, keepdim=True)
        elif name in ("balance.importance", "balance.load"):
            for row, task in enumerate(model.tasks):
                if task in before:
                    mine[row] = source.weights[name][before.index(task)]


@torch.no_grad()
def _put_head(model: MultitaskViT, source: Source, task: str, classes: list[str]) -> int:
    """Copy the rows of the classes that both heads have, and return their number.

    Only weights of features that both heads read are copied. Those of the others are set to zero.
    """
    rows = {name: row for row, name in reversed(list(enumerate(source.classes[task])))}
    pairs = [(row, rows[name]) for row, name in enumerate(classes) if name in rows]
    if pairs:
        mine, theirs = map(list, zip(*pairs, strict=True))
        parameters, weight = dict(model.heads[task].named_parameters()), source.weights[f"heads.{task}.weight"]
        parameters["bias"][mine] = source.weights[f"heads.{task}.bias"][theirs]
        parameters["weight"][mine] = 0.0
        its = _columns(model, source.config.plan.head_blocks)
        for block, columns in _columns(model, model.head_blocks).items():
            if block in its:
                parameters["weight"][mine, columns] = weight[theirs, its[block]]
    return len(pairs)


def _columns(model: MultitaskViT, head_blocks: list[int]) -> dict[int | None, slice]:
    """Return the columns of a head's weight by the block whose class token they read; None: the last block's output."""
    start, width = model.vit.num_features, model.vit.embed_dim
    read = enumerate(sorted(head_blocks))
    return {None: slice(0, start)} | {block: slice(start + i * width, start + (i + 1) * width) for i, block in read}


# --- in words ---


def _describe(
    model: MultitaskViT,
    source: Source,
    classes: dict[str, list[str]],
    replaced: set[str],
    parts: dict[str, list[int]],
    heads: dict[str, int],
) -> list[str]:
    blocks = sorted({_block(name) for name in replaced if name.startswith("vit.blocks.")})
    others = sorted({name.split(".")[1] for name in replaced if not name.startswith("vit.blocks.")})
    taken = [*([f"blocks {_listed(blocks)}"] if blocks else []), *others]
    taken += [f"{kind} of blocks {_listed(places)}" for kind, places in parts.items() if places]
    if are_many(heads):
        known = sum(len(classes[task]) for task in heads)
        taken.append(f"heads of {len(heads)} tasks ({sum(heads.values())} of {known} classes)")
    else:
        taken += [f"head of {task} ({count} of {len(classes[task])} classes)" for task, count in heads.items()]
    moe = [index for index, plan in enumerate(model.plan) if plan.moe]
    new = [f"head of {task}" for task in classes if task not in heads]
    if model.trained_tasks is not model.tasks and moe and new:
        its = "its routers" if len(new) == 1 else "their routers"
        new.append(f"{its}, each the mean over the other tasks")
    for task in heads:
        if names := [name for name in classes[task] if name not in source.classes[task]]:
            new.append(f"classes of {task} ({_listed(names)})")
    read, source_read = set(model.head_blocks), set(source.config.plan.head_blocks)
    if heads and read - source_read:
        new.append(f"heads' weights for class tokens of blocks {_listed(sorted(read - source_read))}, from zero")
    if copied := [index for index in moe if index not in parts["experts"]]:
        low_rank = any(getattr(model.vit.blocks[i].mlp, "shared", None) is not None for i in copied)
        how = "low-rank experts of blocks {}, from zero" if low_rank else "experts of blocks {}, copies of the FFN"
        new.append(how.format(_listed(copied)))
    if fresh := [index for index in moe if index not in parts["routers"]]:
        new.append(f"routers of blocks {_listed(fresh)}")
    left = [f"head of {task}" for task in source.classes if task not in classes]
    for task in heads:
        if names := [name for name in source.classes[task] if name not in classes[task]]:
            left.append(f"classes of {task} ({_listed(names)})")
    if heads and source_read - read:
        left.append(f"heads' weights for class tokens of blocks {_listed(sorted(source_read - read))}")
    theirs = {_block(name) for name in source.weights if ".mlp.experts." in name}
    if unused := sorted(theirs - set(parts["experts"])):
        left.append(f"experts of blocks {_listed(unused)}")
    chosen = {i: ADAPTERS[block.adapter.kind] for i, block in enumerate(source.plan) if block.adapter is not None}
    added = {i for i, kind in chosen.items() if kind.merged_weight is None}
    if unused := sorted(added - set(parts["adapters"])):  # the others were merged into weights
        left.append(f"adapters of blocks {_listed(unused)}")
    kinds = {"taken": taken or ["nothing"], "new": new, "left": left}
    return [f"{kind}: {', '.join(each)}" for kind, each in kinds.items() if each]


def _listed(values: Iterable) -> str:
    names = list(map(str, values))
    return ", ".join(names[:SHOWN] if len(names) > 2 * SHOWN else names) + (
        f" and {len(names) - SHOWN} more" if len(names) > 2 * SHOWN else ""
    )
