"""Derive the linear probe of a configuration, and its data settings."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from moe_bsr.config.alast import AlastConfig
from moe_bsr.config.schema import AUGMENT_KEYS, Config, DataConfig, SamplerConfig

# Keys of `data` that set how training images are augmented, and what is cached of them.
FORM_KEYS = ("views", "crop_scale", "hflip", "feature_cache_mb", "feature_cache", "feature_cache_dir", *AUGMENT_KEYS)


def probe_config(config: Config, head_blocks: Iterable[int] | None = None) -> Config:
    """Return the linear probe of a configuration: same backbone, tasks and dropping, but no trained blocks or experts.

    Args:
        head_blocks: replaces the configuration's `plan.head_blocks`.
    """
    blocks = config.plan.head_blocks if head_blocks is None else list(head_blocks)
    return replace(
        config,
        mode="multitask",  # heads are independent, so one model for all tasks is equivalent
        storage="exact",
        adapter=None,
        plan=replace(config.plan, train_blocks=[], moe_blocks=[], head_blocks=blocks),
        sampler=SamplerConfig(),
        data=unaugmented(config.data),
        train=replace(
            config.train,
            optimizer="lbfgs",
            step_in_backward=False,
            alast=AlastConfig(),
            steps=1 if config.train.minutes is None else None,
            epochs=None,
            patience=None,
            only=None,
            init_from=None,
            warmup_steps=None,
            eval_every=None,
            ema_decay=None,
            mixup=0.0,
            cutmix=0.0,
            class_weights="none",
            task_weighting="fixed",
            grad_accumulation_steps=1,
        ),
    )


def unaugmented(data: DataConfig) -> DataConfig:
    """Return the data settings with evaluation transforms for training images, and without a feature cache."""
    fields = DataConfig.__dataclass_fields__
    changes: dict[str, Any] = {key: fields[key].default for key in FORM_KEYS}
    return replace(data, **changes | {"augment": False})
