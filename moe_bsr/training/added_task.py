"""Configure a run that adds one task to a trained run: only the new head trains (`train.only`).

The new task's routers start as the mean of the other tasks' routers (`warm_start.py`) and stay fixed. So the features
are fixed too, and the head is solved in one go, as in a linear probe. Training router and head with gradient updates
reached the same accuracy in ten times the time (docs/share.md).
"""

from dataclasses import replace
from pathlib import Path

from moe_bsr.config import Config, ConfigError, SamplerConfig, load
from moe_bsr.config.probe import unaugmented
from moe_bsr.config.train import TrainConfig
from moe_bsr.config.yaml_text import read_yaml
from moe_bsr.runs import archive
from moe_bsr.runs.config_file import read_config


def added_task_config(run: Path, task: str) -> Config:
    """Return the configuration of a run that has one more task than `run`.

    Args:
        run: a finished run with one model for all its tasks: its folder, or the zip file of a shared run.
        task: the new task's name, its YAML file, or a configuration with this single task.
    Raises:
        ConfigError: the run does not exist, already has this task, or has one model per task; or `task` is a
            configuration with several tasks.
    """
    task = _of_configuration(task)
    with archive.opened(run) as folder:
        config, resolved = read_config(folder)
    name = replace(config, tasks=[task], train=TrainConfig()).task_names()[0]
    if name in config.task_names():
        raise ConfigError(f"{run} has a task {name} already; rename the file of the new one, or remove that first")
    if config.mode == "single_task":
        raise ConfigError(
            f"{run} has a model of its own for each task: train one for {name} with mode=single_task, tasks=[{task}]"
        )
    return replace(
        config,
        tasks=[*config.tasks, task],
        sampler=SamplerConfig(),
        data=replace(unaugmented(config.data), root=resolved.get("data_root", config.data.root)),
        runtime=replace(config.runtime, precision=resolved["precision"]),
        train=TrainConfig(
            init_from=str(run),
            only=[name],
            optimizer="lbfgs",
            steps=1,
            save=config.train.save,
            pictures=config.train.pictures,
            evaluate_test=config.train.evaluate_test,
        ),
    )


def _of_configuration(task: str) -> str:
    """Return the single task of a configuration file; return anything else unchanged."""
    file = Path(task)
    tree = read_yaml(file, task) if file.suffix in (".yaml", ".yml") and file.is_file() else None
    if not isinstance(tree, dict) or "source" in tree or not {"tasks", "extends"} & tree.keys():
        return task
    tasks = load(file).tasks
    if len(tasks) > 1:
        raise ConfigError(f"{task} is a configuration of several tasks: name one of {', '.join(tasks)}")
    return tasks[0]
