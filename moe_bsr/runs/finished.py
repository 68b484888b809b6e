"""What is left of a run when its training is over: the best weights, for all of its tasks or some, and how to use them.

`share.py` gives it to others, `write_run` makes a run folder of it. Nothing that only training needs is in it, so
nobody resumes it; another run can start from it (`train.init_from`).
"""

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

# The state of a checkpoint that no training goes on from.
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
    """A run as it is used.

    Attributes:
        config: without what only its training needed. resolved: what it led to.
        weights: what training changed, by name; an average is in them. step: of the weights.
        report: of the run, if it has one.
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
    """The best weights of a run, of all tasks but those `without`.

    Args:
        run: a folder, or a zip file of a shared run.
    Raises:
        ConfigError: no run, one with a model for each task, an unknown task or no task left.
        CheckpointError: missing or damaged weights.
    """
    with archive.opened(run) as folder:
        config, resolved = read_config(folder)
        if config.mode == "single_task":
            names = config.task_names()
            raise ConfigError(f"{run} has a model for each task: name one of them, such as {run / names[0]}")
        before, without = config.task_names(), without or []
        after = [task for task in before if task not in without]
        if unknown := [task for task in without if task not in before]:
            raise ConfigError(f"no task {unknown[0]!r} in {run}: it has {', '.join(before)}")
        if not after:
            raise ConfigError(f"{', '.join(before)}: all tasks of {run}; a run has at least one")
        saved = read_named(folder, "best", config)
        told = report.read(folder)
    return Finished(
        _finished_config(config, after),
        resolved | {"tasks": {task: resolved["tasks"][task] for task in after}},
        _of_tasks(saved.weights | (saved.average or {}), before, after),
        saved.step,
        told and _report_of(told, after),
    )


def write_run(finished: Finished, source: Path, run: Path) -> None:
    """A run folder of it: for whatever reads a run.

    Args:
        source: the run that it was read from.
        run: where nothing is yet; it appears whole or not at all.
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


class appearing:
    """A folder that is filled under another name, and has its own once the block ends without an error.

    Raises:
        ConfigError: there is something of that name already.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.temporary = folder, folder.with_name(folder.name + ".tmp")

    def __enter__(self) -> Path:
        if files.kind(self.folder) is not None:
            raise ConfigError(f"{self.folder} is there already; remove it, or name another place")
        files.remove(self.temporary)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            self.temporary.rename(self.folder)
        else:
            files.remove(self.temporary)


def _finished_config(config: Config, tasks: list[str]) -> Config:
    """The configuration of a model that is used: an average is in its weights, and nothing says what else trained."""
    train, files_of = config.train, config.task_files()
    solved = config.plan.train_blocks == [] and config.adapter is None
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


def _of_tasks(weights: dict[str, Tensor], before: list[str], after: list[str]) -> dict[str, Tensor]:
    """The weights without what belongs to tasks that are gone: heads, routers, and rows or columns of a task."""
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


def _report_of(told: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """The report, of these tasks alone."""
    entries = {task: about for task, about in told["tasks"].items() if task in tasks}
    scores = [about.get("top1") for about in entries.values()]
    use = {block: {t: v for t, v in of.items() if t in tasks} for block, of in told.get("expert_use", {}).items()}
    whole = all(score is not None for score in scores)
    return (
        told
        | {"tasks": entries, "mean_top1": sum(scores) / len(scores) if whole else None}
        | ({"expert_use": use} if use else {})
    )
