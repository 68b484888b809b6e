"""Typed configuration of a run: dataclasses that check their values.

A configuration file contains only the differences from the file that it `extends`. An unknown key, a wrong type or an
impossible combination raises ConfigError before anything is loaded. Its message is one line with the key, the value,
what is allowed and the closest spelling. `configs/base.yaml` lists every key with its default and meaning. It is the
reference, and a test compares it with this file.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from moe_bsr.config.alast import require_whole_blocks
from moe_bsr.config.errors import require, require_within
from moe_bsr.config.moe import MoEConfig
from moe_bsr.config.task_folders import name_of
from moe_bsr.config.train import TrainConfig


@dataclass(kw_only=True, slots=True)
class BackboneConfig:
    """Section `backbone`. `configs/base.yaml` documents the keys of all sections."""

    name: str = "vit_pico_patch8_64"
    weights: str = "bundled"
    image_size: int | None = None

    def __post_init__(self) -> None:
        require_within("backbone", self, image_size=(1, 4096))


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """Section `plan`."""

    train_blocks: Literal["all"] | list[int] = field(default_factory=lambda: [3, 7, 11])
    train_weights: Literal["all", "proj", "bias", "norm"] = "all"
    drop_blocks: list[int] = field(default_factory=lambda: [3, 6, 9])
    keep_rate: float | list[float] = 0.5
    moe_blocks: list[int] = field(default_factory=lambda: [3, 7, 11])
    head_blocks: list[int] = field(default_factory=list)

    @property
    def keep_rates(self) -> dict[int, float]:
        """The keep rate of each block of `drop_blocks`."""
        rates = self.keep_rate if isinstance(self.keep_rate, list) else [self.keep_rate] * len(self.drop_blocks)
        return dict(zip(self.drop_blocks, rates, strict=True))

    def __post_init__(self) -> None:
        for key in ("train_blocks", "drop_blocks", "moe_blocks", "head_blocks"):
            blocks = getattr(self, key)
            if blocks != "all":
                require(len(set(blocks)) == len(blocks), f"plan.{key}", blocks, "each block once")
        rates = self.keep_rate if isinstance(self.keep_rate, list) else [self.keep_rate]
        require(
            all(0 < rate <= 1 for rate in rates),
            "plan.keep_rate",
            self.keep_rate,
            "in (0, 1], where 1 keeps every token",
        )
        require(
            not isinstance(self.keep_rate, list) or len(self.keep_rate) == len(self.drop_blocks),
            "plan.keep_rate",
            self.keep_rate,
            f"one number, or one for each of plan.drop_blocks = {self.drop_blocks}",
        )
        require(
            self.train_weights == "all" or not self.moe_blocks,
            "plan.train_weights",
            self.train_weights,
            f"all with plan.moe_blocks = {self.moe_blocks}, whose experts would not train; or set plan.moe_blocks=[]",
        )
        if self.train_blocks != "all":
            frozen = sorted(set(self.moe_blocks) - set(self.train_blocks))
            require(
                not frozen,
                "plan.moe_blocks",
                self.moe_blocks,
                f"blocks {frozen} are frozen, so their experts would not train; add them to plan.train_blocks, or "
                "remove them here",
            )


@dataclass(kw_only=True, slots=True)
class TokensConfig:
    """Section `tokens`."""

    reduce: Literal["drop", "merge"] = "drop"
    fuse: Literal["raw", "normalized", "none"] = "raw"
    detach_fusion_weights: bool = False
    protect_fused: bool = False
    rank_by: Literal["probabilities", "logits"] = "probabilities"

    def __post_init__(self) -> None:
        require(
            not (self.fuse == "none" and (self.detach_fusion_weights or self.protect_fused)),
            "tokens.fuse",
            self.fuse,
            "raw or normalized with tokens.detach_fusion_weights or tokens.protect_fused, which need a fused token; or "
            "set these to false",
        )
        for each in fields(self) if self.merges else ():
            value = getattr(self, each.name)
            only = f"{str(each.default).lower()} with tokens.reduce = merge: the key applies to dropped tokens only"
            require(each.name == "reduce" or value == each.default, f"tokens.{each.name}", value, only)

    @property
    def merges(self) -> bool:
        return self.reduce == "merge"

    @property
    def fuses(self) -> bool:
        """Whether dropped tokens are fused into one."""
        return not self.merges and self.fuse != "none"

    @property
    def attached(self) -> bool:
        """Whether the scores receive a gradient, through the weights of the fused token."""
        return self.fuses and not self.detach_fusion_weights


def is_crop_range(scale: Sequence[float]) -> bool:
    """Return whether `scale` is a valid range [low, high] of the share of an image's area that a crop covers."""
    return len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1


AUGMENT_KEYS = ("auto_augment", "color_jitter", "erasing")  # beyond crop and flip


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Section `data`."""

    root: str = "data"
    download: bool = False
    val_fraction: float = 0.1
    val_images: int | None = None
    train_images: int | None = None
    split_seed: int = 0
    resize: Literal["timm", "squash"] = "timm"
    augment: bool = True
    crop_scale: list[float] | None = None
    hflip: bool | None = None
    auto_augment: str | None = None
    color_jitter: float | None = None
    erasing: float = 0.0
    unreadable: Literal["stop", "skip"] = "stop"
    image_cache_mb: int = 2048
    views: int | None = None
    feature_cache_mb: int | None = None
    feature_cache: Literal["exact", "bf16", "int8"] = "exact"
    feature_cache_dir: str | None = None
    prefetch: int = 0

    def __post_init__(self) -> None:
        require(0 < self.val_fraction < 0.5, "data.val_fraction", self.val_fraction, "above 0 and below 0.5")
        scale = self.crop_scale
        require(
            scale is None or is_crop_range(scale),
            "data.crop_scale",
            scale,
            "null (the task's own) or [low, high] within (0, 1]",
        )
        jitter = self.color_jitter
        require(jitter is None or 0 <= jitter <= 1, "data.color_jitter", jitter, "null or 0 to 1; usual is 0.4")
        require(0 <= self.erasing <= 1, "data.erasing", self.erasing, "a probability, 0 to 1; usual is 0.25")
        said = [key for key in AUGMENT_KEYS if getattr(self, key) not in (None, 0.0)]
        require(
            self.augment or (scale is None and self.hflip is None and not said),
            "data.augment",
            self.augment,
            f"true with {' and '.join(f'data.{key}' for key in said or ('crop_scale', 'hflip'))}, which configure "
            "augmentation; or leave these out",
        )
        mb = {"image_cache_mb": (0, 2**24), "feature_cache_mb": (1, 2**24)}
        counts = {"prefetch": (0, 100), "views": (1, 10_000), "val_images": (1, 10**9), "train_images": (1, 10**9)}
        require_within("data", self, **mb, **counts)
        require(
            self.feature_cache_mb is None or not self.augment or self.views is not None,
            "data.feature_cache_mb",
            self.feature_cache_mb,
            "null while data.augment is true and data.views null: each crop is new, so no features can be reused",
        )
        require(self.views is None or self.augment, "data.views", self.views, "null with data.augment = false")
        for key, off in (("feature_cache", "exact"), ("feature_cache_dir", None)):
            value = getattr(self, key)
            require(
                value == off or self.feature_cache_mb is not None,
                f"data.{key}",
                value,
                f"{off or 'null'} while data.feature_cache_mb is null",
            )


@dataclass(kw_only=True, slots=True)
class SamplerConfig:
    """Section `sampler`."""

    kind: str = "round_robin"
    temperature: float = 2.0
    classes: Literal["natural", "balanced"] = "natural"

    def __post_init__(self) -> None:
        require(
            self.temperature > 0,
            "sampler.temperature",
            self.temperature,
            "above 0; 1 is proportional to the dataset sizes, large values are nearly uniform",
        )


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """Section `runtime`."""

    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        require_within("runtime", self, threads=(1, 1024))


@dataclass(kw_only=True, slots=True)
class Config:
    """Configuration of a run. `configs/base.yaml` documents every key."""

    mode: Literal["multitask", "single_task"] = "multitask"
    tasks: list[str] = field(default_factory=lambda: ["shapes", "textures", "glyphs", "petals", "fractals"])
    seed: int = 0
    storage: str | dict | list[dict] = "exact"
    adapter: str | dict | list[dict] | None = None
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        require(len(self.tasks) >= 1, "tasks", self.tasks, "at least one task")
        names = self.task_names()
        for name in names:
            require(
                re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name) is not None,
                "tasks",
                name,
                "a task's name has at most 100 letters, digits, _ and - (folders, heads and tags are named after it); "
                + (f"write a folder as {name}/, with a slash at its end" if "/" in name else "write several as [a, b]"),
            )
        twice = [task for task, name in zip(self.tasks, names, strict=True) if names.count(name) > 1]
        alike = f": {' and '.join(twice[:2])} have the name {name_of(twice[0])}, rename one" if twice else ""
        require(not twice, "tasks", self.tasks, f"each task once{alike}")
        require_whole_blocks(self)
        if self.train.optimizer == "lbfgs":
            self._require_probe()
        else:
            self._require_weighing()
        if self.train.only is not None:
            self._require_start(names, self.train.only)
        unknown = sorted(set(self.train.task_weights) - set(names))
        require(not unknown, "train.task_weights", self.train.task_weights, f"{unknown} not among the tasks {names}")

    def _require_start(self, names: list[str], only: list[str]) -> None:
        """Refuse `train.only` without a trained run from which the frozen part comes."""
        known = bool(only) and len(set(only)) == len(only) and set(only) <= set(names)
        require(known, "train.only", only, f"one or more of the tasks {names}, each once")
        source = self.train.init_from
        require(
            source is not None, "train.init_from", source, "with train.only: the run that everything else comes from"
        )
        require(self.mode == "multitask", "mode", self.mode, "multitask with train.only: the tasks share one model")

    def _require_probe(self) -> None:
        """Refuse settings that cannot be combined with the linear probe, which solves the heads on fixed features."""
        frozen = self.train.only is not None
        for key, value, needed in (
            ("plan.train_blocks", [] if frozen else self.plan.train_blocks, []),
            ("adapter", None if frozen else self.adapter, None),
            ("data.augment", self.data.augment, False),
            ("train.ema_decay", self.train.ema_decay, None),
            ("train.steps", self.train.steps, 1 if self.train.minutes is None else None),
            ("train.epochs", self.train.epochs, None),
            ("train.mixup", self.train.mixup, 0.0),
            ("train.cutmix", self.train.cutmix, 0.0),
            ("train.class_weights", self.train.class_weights, "none"),
            ("train.task_weighting", self.train.task_weighting, "fixed"),
            ("train.step_in_backward", self.train.step_in_backward, False),
            ("sampler.classes", self.sampler.classes, "natural"),
        ):
            only = "null" if needed is None else str(needed).lower()  # as in YAML
            require(
                value == needed, key, value, f"{only} with train.optimizer = lbfgs (moe-bsr probe sets all such keys)"
            )

    def _require_weighing(self) -> None:
        """Refuse mixed images together with cached features, and task weighting in runs where it has no effect."""
        for key in ("mixup", "cutmix"):
            value = getattr(self.train, key)
            only = "0 with data.feature_cache_mb: each mixed image is new, so no features can be reused"
            require(not value or self.data.feature_cache_mb is None, f"train.{key}", value, only)
        require(
            not self.train.step_in_backward or self.sampler.kind != "joint",
            "train.step_in_backward",
            self.train.step_in_backward,
            "false with sampler.kind = joint, which sums the gradients of several tasks",
        )
        weighting = self.train.task_weighting
        require(
            weighting == "fixed" or self.mode == "multitask",
            "train.task_weighting",
            weighting,
            "fixed with mode = single_task, where tasks share no model",
        )
        require(
            weighting != "pcgrad" or self.sampler.kind == "joint",
            "train.task_weighting",
            weighting,
            f"needs sampler.kind = joint, which has all tasks in each update (it is {self.sampler.kind})",
        )

    def task_names(self) -> list[str]:
        """Return the names of the tasks. A task given as a YAML file or a folder of images is named after it."""
        return [name_of(task) for task in self.tasks]

    def trained_tasks(self) -> list[str]:
        """Return the names of the tasks that train: those of `train.only`, or all."""
        only = self.train.only
        return [name for name in self.task_names() if only is None or name in only]

    def task_files(self) -> dict[str, str]:
        """Return the entries of `tasks`, which `data.load_spec` accepts, by task name."""
        return dict(zip(self.task_names(), self.tasks, strict=True))

    def of_task(self, name: str) -> "Config":
        """Return the configuration of a run of one task alone."""
        weights = {task: weight for task, weight in self.train.task_weights.items() if task == name}
        train = dataclasses.replace(self.train, task_weights=weights)
        return dataclasses.replace(self, mode="multitask", tasks=[self.task_files()[name]], train=train)
