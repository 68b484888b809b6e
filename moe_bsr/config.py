"""Typed configuration: what a run is, as dataclasses; read strictly from YAML with dotted overrides.

A configuration file holds only what differs from the file it `extends`. Nothing is guessed: an unknown
key, a wrong type or an impossible combination is refused before anything is loaded, in one line that
names the key, the value, what is allowed and the nearest spelling. `configs/base.yaml` lists every key
with its default and what it means; that page is the reference, and a test keeps it equal to this file.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


# Attributes of torch's module dictionaries, which therefore cannot name an entry.
RESERVED = ("clear", "copy", "forward", "get", "items", "keys", "pop", "training", "train", "type",
            "update", "values")


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the key, the value and what is allowed."""


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise a ConfigError of the one form used everywhere unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} = {value!r}: {allowed}")


@dataclass(kw_only=True, slots=True)
class BackboneConfig:
    name: str = "vit_pico_patch8_64"
    weights: str = "shipped"
    image_size: int | None = None

    def __post_init__(self) -> None:
        require(self.image_size is None or self.image_size >= 1, "backbone.image_size", self.image_size,
                "null (the backbone's own) or a multiple of its patch size in pixels")


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    trainable: Literal["all"] | list[int] = field(default_factory=lambda: [3, 7, 11])
    drop: list[int] = field(default_factory=lambda: [3, 6, 9])
    keep: float | list[float] = 0.5
    experts: list[int] = field(default_factory=lambda: [3, 7, 11])

    def __post_init__(self) -> None:
        for key in ("trainable", "drop", "experts"):
            blocks = getattr(self, key)
            if blocks != "all":
                require(len(set(blocks)) == len(blocks), f"plan.{key}", blocks, "each block once")
        keeps = self.keep if isinstance(self.keep, list) else [self.keep]
        require(all(0 < keep <= 1 for keep in keeps), "plan.keep", self.keep,
                "keep rates lie in (0, 1]; 1 keeps every token")
        require(not isinstance(self.keep, list) or len(self.keep) == len(self.drop), "plan.keep",
                self.keep, f"one number, or one for each of plan.drop = {self.drop}")
        if self.trainable != "all":
            frozen = sorted(set(self.experts) - set(self.trainable))
            require(not frozen, "plan.experts", self.experts, f"blocks {frozen} are frozen, so their "
                    "experts would never learn; add them to plan.trainable or take them out")


@dataclass(kw_only=True, slots=True)
class TokensConfig:
    fuse: Literal["raw", "normalised", "none"] = "raw"
    detach: bool = False
    protect: bool = False
    rank: Literal["probabilities", "logits"] = "probabilities"

    def __post_init__(self) -> None:
        require(not (self.fuse == "none" and (self.detach or self.protect)), "tokens.fuse", self.fuse,
                "tokens.detach and tokens.protect speak of the fused token; set them to false")


@dataclass(kw_only=True, slots=True)
class MoEConfig:
    experts: int = 16
    top_k: int = 4
    ratio: int = 4
    router: Literal["per_task", "task_conditioned"] = "per_task"
    train_router: bool = True
    renormalise: bool = True
    gate_noise: float = 0.0
    clone_noise: float = 0.0
    balance: Literal["per_task", "across_tasks", "none"] = "per_task"
    balance_weight: float = 0.01
    engine: Literal["auto", "loop", "grouped"] = "auto"

    def __post_init__(self) -> None:
        require(self.experts >= 1, "moe.experts", self.experts, "at least 1")
        require(1 <= self.top_k <= self.experts, "moe.top_k", self.top_k,
                f"1 to moe.experts = {self.experts}")
        require(self.ratio >= 1, "moe.ratio", self.ratio, "at least 1 (hidden width = ratio x width)")
        for key in ("gate_noise", "clone_noise", "balance_weight"):
            require(getattr(self, key) >= 0, f"moe.{key}", getattr(self, key), "at least 0")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    root: str = "data"
    download: bool = False
    validation: float = 0.1
    data_seed: int = 0
    resize: Literal["timm", "straight"] = "timm"
    crop_scale: list[float] | None = None
    flip: bool | None = None
    cache_mb: int = 2048
    prefetch: int = 0

    def __post_init__(self) -> None:
        require(0 < self.validation < 0.5, "data.validation", self.validation, "between 0 and 0.5")
        scale = self.crop_scale
        require(scale is None or (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1),
                "data.crop_scale", scale, "null (the task's own) or [low, high] within (0, 1]")
        require(self.cache_mb >= 0, "data.cache_mb", self.cache_mb, "at least 0 megabytes")
        require(self.prefetch >= 0, "data.prefetch", self.prefetch, "at least 0 batches ahead")


@dataclass(kw_only=True, slots=True)
class SamplerConfig:
    kind: Literal["round_robin", "proportional", "temperature", "joint", "paper"] = "round_robin"
    temperature: float = 2.0

    def __post_init__(self) -> None:
        require(self.temperature > 0, "sampler.temperature", self.temperature,
                "above 0; 1 is proportional to the dataset sizes, large is uniform")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    optimiser: Literal["sgd", "adamw"] = "adamw"
    lr: float = 1e-3
    min_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    warmup: float = 0.05
    clip: float | None = 1.0
    label_smoothing: float = 0.0
    ema: float | None = None
    task_weights: dict[str, float] = field(default_factory=dict)
    evaluate_every: int = 0
    checkpoint_every: int = 0
    select: Literal["best", "last"] = "best"
    test: bool = True
    save: Literal["trained", "all"] = "trained"

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulate"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        for key in ("evaluate_every", "checkpoint_every", "weight_decay"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "at least 0")
        require(self.batch_size % self.accumulate == 0, "train.accumulate", self.accumulate,
                f"must divide train.batch_size = {self.batch_size}: micro-batches split one batch")
        require(0 < self.lr < math.inf, "train.lr", self.lr, "above 0 and finite")
        require(0 <= self.min_lr <= self.lr, "train.min_lr", self.min_lr, f"0 to train.lr = {self.lr}")
        require(0 <= self.momentum < 1, "train.momentum", self.momentum, "[0, 1)")
        require(0 < self.layer_decay <= 1, "train.layer_decay", self.layer_decay, "in (0, 1]")
        require(0 <= self.warmup, "train.warmup", self.warmup,
                "a fraction of train.steps below 1, or a number of updates")
        require(self.clip is None or self.clip > 0, "train.clip", self.clip, "null or above 0")
        require(0 <= self.label_smoothing < 1, "train.label_smoothing", self.label_smoothing, "[0, 1)")
        require(self.ema is None or 0 < self.ema < 1, "train.ema", self.ema, "null or a decay in (0, 1)")
        require(all(weight > 0 for weight in self.task_weights.values()), "train.task_weights",
                self.task_weights, "weights above 0")


@dataclass(kw_only=True, slots=True)
class MachineConfig:
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        require(self.threads is None or self.threads >= 1, "machine.threads", self.threads,
                "null or at least 1")


@dataclass(kw_only=True, slots=True)
class Config:
    mode: Literal["multitask", "stl"] = "multitask"
    tasks: list[str] = field(
        default_factory=lambda: ["shapes", "textures", "glyphs", "petals", "fractals"])
    seed: int = 0
    storage: Literal["exact", "recompute"] = "exact"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        require(len(self.tasks) >= 1, "tasks", self.tasks, "at least one task")
        names = self.task_names()
        for name in names:
            require(re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None and name not in RESERVED, "tasks",
                    name, "a task's name has letters, digits, _ and - only (it names folders, heads and "
                    f"tags) and is none of {', '.join(RESERVED)}")
        require(len(set(names)) == len(names), "tasks", self.tasks, "each task once")
        unknown = sorted(set(self.train.task_weights) - set(names))
        require(not unknown, "train.task_weights", self.train.task_weights,
                f"{unknown} not among the tasks {names}")

    def task_names(self) -> list[str]:
        """Names of the tasks; a task given as a path to a YAML file is named by the file's stem."""
        return [Path(task).stem if task.endswith((".yaml", ".yml")) else task for task in self.tasks]


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML configuration with everything it extends, then apply `a.b=value` overrides.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type or impossible value.
    """
    tree = _read_tree(Path(path), ())
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"override {text!r}: write key=value, for example train.steps=200")
        _set_dotted(tree, key.strip(), _parse(value, key))
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> Config:
    """Build a checked Config from nested dictionaries (as in a resolved `config.yaml`)."""
    return _convert(tree, Config, "")


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """The configuration as YAML, keys in the order of their definition."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def replace(config: Config, **changes: Any) -> Config:
    """A copy with changed values; keys as in `train__steps=10` reach into sections. Checked again."""
    tree = to_dict(config)
    for key, value in changes.items():
        _set_dotted(tree, key.replace("__", "."), value)
    return from_dict(tree)


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"extends: {path} extends itself through {[p.name for p in seen]}")
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        raise ConfigError(f"no configuration file {path}" + (f"; did you mean {near[0]}?" if near else ""))
    tree = _parse(path.read_text(), str(path)) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    require(isinstance(parent, str), "extends", parent, "the name of one YAML file beside this one")
    return _merge(_read_tree(path.parent / parent, (*seen, path.resolve())), tree)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _NoDuplicates)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None


class _NoDuplicates(yaml.SafeLoader):
    """YAML as usual, but a key written twice is refused: the first one would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{key}: written twice {node.start_mark}")
        return super().construct_mapping(node, deep)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {section!r} is a value, not a section")
    tree[last] = value


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint` asks for, or a ConfigError that says what was expected."""
    if dataclasses.is_dataclass(hint):
        return _convert_section(value, hint, key)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _convert(value, option, key)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in arguments and type(value) is type(arguments[0]):
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in arguments], 1)
        hint_text = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key} = {value!r}: one of {', '.join(map(str, arguments))}{hint_text}")
    elif origin is list and isinstance(value, (list, tuple)):
        return [_convert(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {k: _convert(v, arguments[1], f"{key}.{k}") for k, v in value.items()}
    elif hint is types.NoneType and value is None:
        return None
    elif hint is float and isinstance(value, str) and _is_number(value):
        return float(value)  # YAML 1.1 reads 1e-3 as a string
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    raise ConfigError(f"{key} = {value!r}: expected {_describe(hint)}")


def _convert_section(value: Any, cls: type, key: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{key} = {value!r}: expected a section with keys and values")
    hints = typing.get_type_hints(cls)
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, 1)
            full = f"{key}.{name}" if key else str(name)
            raise ConfigError(f"unknown key {full}" + (f"; did you mean {near[0]!r}?" if near else "")
                              + f" (allowed: {', '.join(hints)})")
    prefix = f"{key}." if key else ""
    return cls(**{name: _convert(item, hints[name], prefix + name) for name, item in value.items()})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return " or ".join(repr(option) for option in arguments)
    if origin is list:
        return f"a list of {_describe(arguments[0])}s"
    if origin is dict:
        return f"a mapping of names to {_describe(arguments[1])}s"
    names = {int: "whole number", float: "number", bool: "true/false value", str: "text",
             types.NoneType: "null"}
    return names.get(hint, str(hint))
