"""Tasks that a run takes over from another as they are (`train.only`): their records, lists of images and scores.

The run that they were trained in may be gone by the time this one is resumed or loaded, so all of it is copied when
this one begins: records into `config.yaml`, the report into `source_report.json`.
"""

import json
from pathlib import Path
from typing import Any

from moe_bsr.config import Config, ConfigError
from moe_bsr.runs import archive, checkpoint, data_record
from moe_bsr.runs.config_file import read_config
from moe_bsr.runtime import files

SOURCE_REPORT = "source_report.json"
COUNTS = {"images": 0, "epochs": 0.0, "updates": 0}  # of a task, where no report tells them
SCORES = ("top1", "top1_low", "top1_high", "top5", "mean_class_accuracy", "ece", "chance", "loss", "n", "confusions")


def records(config: Config, run: Path, resume: bool = False) -> dict[str, dict[str, Any]]:
    """What the run they come from recorded of the tasks that are kept, by task; without `train.only` there are none.

    Args:
        run: this run's folder, which has the records if it goes on from a checkpoint.
    Raises:
        ConfigError: no such run, or it has not all of these tasks.
    """
    kept = _kept(config)
    if not kept:
        return {}
    if resume and checkpoint.steps(run):
        about = read_config(run)[1]["tasks"]
        return {name: about[name] for name in kept}
    with archive.opened(_source(config)) as source:
        before, resolved = read_config(source)
    if before.mode == "single_task":
        raise ConfigError(
            f"train.init_from = {config.train.init_from!r}: it has a model of its own for each task, so another task "
            "is another run: mode=single_task with the new task alone"
        )
    if missing := [name for name in kept if name not in resolved["tasks"]]:
        raise ConfigError(
            f"train.only = {config.train.only}: {', '.join(missing)} would be kept as it is in "
            f"{config.train.init_from}, which has {', '.join(resolved['tasks'])}; train it too, or leave it out"
        )
    root = {"data_root": resolved["data_root"]} if "data_root" in resolved else {}
    return {name: root | resolved["tasks"][name] for name in kept}


def take_over(config: Config, run: Path) -> dict[str, dict[str, Any]]:
    """Copy what this run keeps of the other one into its folder; returns `records`."""
    about = records(config, run)
    if about:
        with archive.opened(_source(config)) as source:
            copy_lists(source, run, list(about))
            for name, copy in (("report.json", SOURCE_REPORT), ("test_evaluations.log",) * 2):
                if files.kind(source / name) == "a file":
                    files.write_whole(run / copy, files.read_bytes(source / name))
    return about


def copy_lists(source: Path, run: Path, tasks: list[str]) -> None:
    """Copy the lists of the images of these tasks, where the other run has them."""
    for task in tasks:
        file = data_record.list_of(source, task)
        if files.kind(file) == "a file":
            data_record.list_of(run, task).parent.mkdir(exist_ok=True)
            files.write_whole(data_record.list_of(run, task), files.read_bytes(file))


def entries(config: Config, run: Path, split: str) -> dict[str, dict[str, Any]]:
    """What the report of this run says of the tasks that are kept: what the other run's said.

    Args:
        split: that this report is of; scores of another one are left out.
    """
    try:
        report = json.loads(files.read_text(run / SOURCE_REPORT))
        told, same = report["tasks"], report["split"] == split
    except (OSError, ValueError, KeyError, TypeError):
        told, same = {}, False
    kept = {}
    for name in _kept(config):
        entry = told.get(name, {})
        kept[name] = COUNTS | {key: value for key, value in entry.items() if same or key not in SCORES}
    return kept


def _kept(config: Config) -> list[str]:
    trained = set(config.trained_tasks())
    return [name for name in config.task_names() if name not in trained]


def _source(config: Config) -> Path:
    assert config.train.init_from is not None  # Config refuses train.only without it
    return Path(config.train.init_from).expanduser()
