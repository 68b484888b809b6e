"""One more task for a trained run: its head and routers train (`train.only`), everything else stays as it is.

The configuration is that of the run, shortened to what such training needs. What comes before the first experts is
computed once for each image.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_bsr.config import Config, ConfigError, SamplerConfig
from moe_bsr.config.train import TrainConfig
from moe_bsr.runs import archive
from moe_bsr.runs.config_file import read_config

EPOCHS, BATCH, EVALUATIONS = 10, 32, 5


def added_task_config(run: Path, task: str) -> Config:
    """The configuration of a run that has one task more.

    Args:
        run: finished, with one model for all its tasks; a folder, or a zip file of a shared one.
        task: name of the new one, or its YAML file.
    Raises:
        ConfigError: no such run, one that has this task already, or one with a model for each task.
    """
    with archive.opened(run) as folder:
        config, resolved = read_config(folder)
    name = replace(config, tasks=[task], train=TrainConfig()).task_names()[0]
    if name in config.task_names():
        raise ConfigError(f"{run} has a task {name} already; rename the file of the new one, or remove that first")
    if config.mode == "single_task":
        raise ConfigError(
            f"{run} has a model of its own for each task: train one for {name} with mode=single_task, tasks=[{task}]"
        )
    routers = config.plan.moe_blocks and config.moe.router == "per_task" and config.moe.train_router
    return replace(
        config,
        tasks=[*config.tasks, task],
        sampler=SamplerConfig(),
        data=replace(
            config.data,
            root=resolved.get("data_root", config.data.root),
            augment=False,
            crop_scale=None,
            hflip=None,
            feature_cache_mb=2048 if routers else None,
        ),
        runtime=replace(config.runtime, precision=resolved["precision"]),
        train=TrainConfig(init_from=str(run), only=[name], **(_ROUTERS if routers else _HEAD)),
    )


# Routers learn by updates. A head alone is solved.
_ROUTERS: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "head_lr_scale": 10, "weight_decay": 0.0}
_HEAD: dict[str, Any] = {"optimizer": "lbfgs", "steps": 1}
