"""A finished run: the best weights for all or some of its tasks, and the configuration needed to use them.

`share.py` makes a shared run of it, `write_run` a run folder. It has nothing that only training needs, so training
cannot be resumed from it. Another run can start from it (`train.init_from`).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.runs import archive, checkpoint, kept_tasks, report
from moe_bsr.runs.config_file import read_config
from moe_bsr.runs.load import read_named
from moe_bsr.runtime import files

# State of a checkpoint from which training is never resumed.
NO_STATE: dict[str, Any] = {
    "pending_evaluation": False,
    "seconds": 0.0,
    "length": {"steps": 0, "minutes": None, "earlier": []},
    "best_step": None,
    "best_mean_top1": None,
    "best_scores": None,
    "untold_scores": None,
    "stale": 0,
    "moments": 0,
    "skipped": {},
    "callbacks": {},
}


@dataclass(slots=True)
class Finished:
    """A finished run, ready to be used.

    Attributes:
        config: the run's configuration without settings that only its training needed.
        resolved: `resolved` of its config.yaml.
        weights: tensors that training changed, by name. A moving average has replaced the live weights.
        step: step of the weights.
        report: the run's report, if it has one.
    """

    config: Config
    resolved: dict[str, Any]
    weights: dict[str, Tensor]
    step: int
    report: dict[str, Any] | None

    @property
    def classes(self) -> dict[str, int]:
        return {task: len(about["classes"]) for task, about in self.resolved["tasks"].items()}


def read_finished(run: Path, without: list[str] | None = None) -> Finished:
    """Read the best weights of a run.

    Args:
        run: a folder, or a zip file of a shared run.
        without: tasks to leave out.
    Raises:
        ConfigError: this is no run, it has one model per task, a task is unknown, or no task is left.
        CheckpointError: the weights are missing or damaged.
    """
    with archive.opened(run) as folder:
        config, resolved = read_config(folder)
        if config.mode == "single_task":
            names = config.task_names()
            raise ConfigError(f"{run} has one model per task: name one of them, such as {run / names[0]}")
        before, without = config.task_names(), without or []
        after = [task for task in before if task not in without]
        if unknown := [task for task in without if task not in before]:
            raise ConfigError(f"no task {unknown[0]!r} in {run}: it has {', '.join(before)}")
        if not after:
            raise ConfigError(f"{', '.join(before)} are all tasks of {run}: at least one must be left")
        saved = read_named(folder, "best", config)
        full_report = report.read(folder)
    return Finished(
        _config_for(config, after),
        resolved | {"tasks": {task: resolved["tasks"][task] for task in after}},
        _weights_for(saved.weights | (saved.average or {}), before, after),
        saved.step,
        full_report and _report_for(full_report, after),
    )


def write_run(finished: Finished, source: Path, run: Path) -> None:
    """Write a finished run as a run folder. The folder appears when it is complete, or not at all.

    Args:
        source: the run that `finished` was read from.
        run: the new folder, which must not exist yet.
    """
    config = finished.config
    tree = configuration.to_dict(config) | {"resolved": finished.resolved}
    with appearing(run) as folder, archive.opened(source) as before:
        kept_tasks.copy_lists(before, folder, config.task_names())
        log = "test_evaluations.log"
        if files.kind(before / log) == "a file":
            files.write_whole(folder / log, files.read_bytes(before / log))
        checkpoint.save(folder, finished.step, {"weights": finished.weights}, NO_STATE | {"step": finished.step})
        files.write_whole(folder / "config.yaml", yaml.safe_dump(tree, sort_keys=False, width=110))
        if finished.report is not None:
            report.write(folder, finished.report | {"config": configuration.to_dict(config)})


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Context in which a folder is filled under a temporary name. It is renamed if no error occurs, else deleted.

    Raises:
        ConfigError: a file or folder of that name exists already.
    """
    if files.kind(folder) is not None:
        raise ConfigError(f"{folder} exists already; remove it, or name another place")
    temporary = folder.with_name(folder.name + ".tmp")
    files.remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        files.remove(temporary)
        raise
    temporary.rename(folder)


def _config_for(config: Config, tasks: list[str]) -> Config:
    """Return the configuration for these tasks, with training settings that no longer apply reset to defaults.

    The moving average is already in the weights. All tasks count as trained, whatever `train.only` said.
    """
    train, files_of = config.train, config.task_files()
    solved = config.plan.train_blocks == [] and config.adapter is None  # otherwise lbfgs is valid only with train.only
    return replace(
        config,
        tasks=[files_of[task] for task in tasks],
        train=replace(
            train,
            init_from=None,
            only=None,
            ema_decay=None,
            optimizer=train.optimizer if solved or train.optimizer != "lbfgs" else "adamw",
            task_weights={task: weight for task, weight in train.task_weights.items() if task in tasks},
        ),
    )


def _weights_for(weights: dict[str, Tensor], before: list[str], after: list[str]) -> dict[str, Tensor]:
    """Remove the parts of tasks that are left out: heads, routers, and their rows or columns in shared tensors."""
    rows = torch.tensor([before.index(task) for task in after])
    gone = [task for task in before if task not in after]
    kept = {}
    for name, value in weights.items():
        if any(name.startswith(f"heads.{task}.") or name.endswith(f".mlp.router.weight.{task}") for task in gone):
            continue
        if name.endswith(".mlp.router.embed.0.weight"):
            value = value[:, rows]
        elif name.startswith("balance."):
            value = value[rows]
        kept[name] = value.contiguous()
    return kept


def _report_for(full_report: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """Return the report restricted to these tasks."""
    entries = {task: about for task, about in full_report["tasks"].items() if task in tasks}
    scores = [about.get("top1") for about in entries.values()]
    use = {
        block: {t: v for t, v in of.items() if t in tasks} for block, of in full_report.get("expert_use", {}).items()
    }
    whole = all(score is not None for score in scores)
    return (
        full_report
        | {"tasks": entries, "mean_top1": sum(scores) / len(scores) if whole else None}
        | ({"expert_use": use} if use else {})
    )
