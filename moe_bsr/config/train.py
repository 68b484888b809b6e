"""Section `train` of a configuration: how a model is trained, and for how long."""

from dataclasses import dataclass, field
from typing import Literal

from moe_bsr.config.alast import AlastConfig
from moe_bsr.config.errors import require, require_within

LENGTHS = ("steps", "epochs", "minutes")  # units of a run's length; a configuration sets one of them
MOST_STEPS = 10**7


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Section `train`. `configs/base.yaml` documents the keys."""

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    patience: int | None = None
    init_from: str | None = None
    only: list[str] | None = None
    batch_size: int = 32
    grad_accumulation_steps: int = 1
    exchange: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["sgd", "adamw", "adamw8", "lbfgs", "mezo"] = "adamw"
    mezo_distance: float = 1e-3
    step_in_backward: bool = False
    alast: AlastConfig = field(default_factory=AlastConfig)
    penalty: Literal["best", "mild"] | float = "best"
    lr: float = 1e-3
    schedule: Literal["cosine", "constant_then_decay"] = "cosine"
    min_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    head_lr_scale: float = 1.0
    expert_lr_scale: float | None = None
    expert_decay: Literal["zero", "mean", "none"] | None = None
    router_lr_scale: float = 1.0
    router_hold: int = 0
    warmup_fraction: float = 0.05
    warmup_steps: int | None = None
    grad_clip_norm: float | None = 1.0
    grad_clip_per: Literal["model", "block", "parameter"] = "model"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    ema_decay: float | None = None
    task_weights: dict[str, float] = field(default_factory=dict)
    task_weighting: Literal["fixed", "uncertainty", "pcgrad"] = "fixed"
    eval_every: int | None = None
    checkpoint_every: int | None = None
    checkpoint_selection: Literal["best", "last"] = "best"
    evaluate_test: bool = True
    save: Literal["trainable", "all"] = "trainable"
    pictures: bool = True
    log_to: list[Literal["csv", "wandb", "mlflow"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = [key for key in LENGTHS if getattr(self, key) is not None]
        if not given:
            self.steps = 1000
        for key in given[1:]:
            only = f"null with train.{given[0]}: set the length of a run once, in steps, epochs or minutes"
            require(False, f"train.{key}", getattr(self, key), only)
        for key in ("epochs", "minutes"):
            value = getattr(self, key)
            require(value is None or 0 < value <= 10**6, f"train.{key}", value, "above 0, at most 1,000,000")
        counts = ("steps", "patience", "eval_every", "checkpoint_every")
        require_within("train", self, **dict.fromkeys(counts, (1, MOST_STEPS)))
        require(
            self.patience is None or (self.eval_every is not None and self.checkpoint_selection == "best"),
            "train.patience",
            self.patience,
            "needs train.eval_every (the updates between evaluations) and train.checkpoint_selection = best",
        )
        require_within("train", self, **dict.fromkeys(("batch_size", "grad_accumulation_steps"), (1, 2**16)))
        require(
            self.batch_size % self.grad_accumulation_steps == 0,
            "train.grad_accumulation_steps",
            self.grad_accumulation_steps,
            f"must divide train.batch_size = {self.batch_size}, because it splits a batch into equal micro-batches",
        )
        require(self.lr > 0, "train.lr", self.lr, "above 0")
        require(0 <= self.min_lr <= self.lr, "train.min_lr", self.min_lr, f"0 to train.lr = {self.lr}")
        require(
            isinstance(self.penalty, str) or 1e-8 <= self.penalty <= 1e4,
            "train.penalty",
            self.penalty,
            "best, mild, or a number from 1e-8 to 1e4",
        )
        require(0 <= self.momentum < 1, "train.momentum", self.momentum, "[0, 1)")
        require(0 < self.layer_decay <= 1, "train.layer_decay", self.layer_decay, "in (0, 1]")
        for key in ("head_lr_scale", "expert_lr_scale", "router_lr_scale"):
            value = getattr(self, key)
            require(value is None or value > 0, f"train.{key}", value, "above 0; relative to train.lr")
        require_within("train", self, router_hold=(0, MOST_STEPS))
        require(
            0 <= self.warmup_fraction < 1,
            "train.warmup_fraction",
            self.warmup_fraction,
            "a share of train.steps in [0, 1); for a number of updates set train.warmup_steps",
        )
        require(
            self.warmup_steps is None or 0 <= self.warmup_steps <= (self.steps or MOST_STEPS),
            "train.warmup_steps",
            self.warmup_steps,
            f"null (train.warmup_fraction decides) or 0 to train.steps = {self.steps or MOST_STEPS}",
        )
        largest = max(
            ("head_lr_scale", "expert_lr_scale", "router_lr_scale"), key=lambda key: getattr(self, key) or 0.0
        )
        highest = self.lr * max(1.0, getattr(self, largest))
        require(
            0 <= self.weight_decay < 1 / highest,
            "train.weight_decay",
            self.weight_decay,
            f"at least 0 and below {1 / highest:.4g}, where one update would remove the whole weight: it is multiplied "
            f"by train.lr = {self.lr:g} and train.{largest} = {getattr(self, largest):g}",
        )
        require(
            self.grad_clip_norm is None or self.grad_clip_norm > 0,
            "train.grad_clip_norm",
            self.grad_clip_norm,
            "null or above 0",
        )
        clips_all = self.grad_clip_norm is not None and self.grad_clip_per == "model"
        for key, fits, needed in (
            ("grad_clip_norm", not clips_all, "null, or train.grad_clip_per = block or parameter,"),
            ("grad_accumulation_steps", self.grad_accumulation_steps == 1, "1"),
        ):
            only = f"{needed} with train.step_in_backward = true, which uses and frees gradients before all are there"
            require(not self.step_in_backward or fits, f"train.{key}", getattr(self, key), only)
        require(0 < self.mezo_distance <= 1, "train.mezo_distance", self.mezo_distance, "above 0, at most 1")
        for key, refused, without in (
            ("step_in_backward", (True,), "false"),
            ("grad_clip_per", ("block", "parameter"), "model"),
            ("task_weighting", ("pcgrad",), "fixed or uncertainty"),
            ("expert_decay", ("mean",), "null, zero or none"),
        ):
            value = getattr(self, key)
            only = f"{without} with train.optimizer = {self.optimizer}, which has no gradients"
            require(self.differentiates or value not in refused, f"train.{key}", value, only)
        require(0 <= self.label_smoothing < 1, "train.label_smoothing", self.label_smoothing, "[0, 1)")
        for key in ("mixup", "cutmix"):
            value = getattr(self, key)
            require(
                0 <= value <= 1000, f"train.{key}", value, "0 (off), or alpha of Beta(alpha, alpha); usual 0.2 or 1"
            )
            require(
                not value or self.batch_size // self.grad_accumulation_steps % 2 == 0,
                f"train.{key}",
                value,
                "needs an even number of images per micro-batch, because they are mixed in pairs: train.batch_size = "
                f"{self.batch_size} / train.grad_accumulation_steps = {self.grad_accumulation_steps}",
            )
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "train.ema_decay",
            self.ema_decay,
            "null or a decay in (0, 1)",
        )
        require(
            all(weight > 0 for weight in self.task_weights.values()),
            "train.task_weights",
            self.task_weights,
            "weights above 0",
        )
        require(
            self.task_weighting != "uncertainty" or not self.task_weights,
            "train.task_weights",
            self.task_weights,
            "{} with train.task_weighting = uncertainty, which learns them",
        )

    @property
    def differentiates(self) -> bool:
        """Whether an update has a backward pass."""
        return self.optimizer != "mezo"
