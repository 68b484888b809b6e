"""Copy the tasks that a run keeps unchanged from another run (`train.only`): records, lists of images and scores.

All of it is copied when the new run begins, because the source run may be gone when the new one is resumed or loaded:
the records into `config.yaml`, the report into `source_report.json`.
"""

import json
from pathlib import Path
from typing import Any

from moe_bsr.config import Config, ConfigError
from moe_bsr.runs import archive, checkpoint, data_record
from moe_bsr.runs.config_file import read_config
from moe_bsr.runs.contents import SCORED
from moe_bsr.runtime import files

SOURCE_REPORT = "source_report.json"
COUNTS = {"images": 0, "epochs": 0.0, "updates": 0}  # a task's counts if there is no report


def records(config: Config, run: Path, resume: bool = False) -> dict[str, dict[str, Any]]:
    """Return the source run's records of the kept tasks, by task. Empty without `train.only`.

    Args:
        run: this run's folder. If it is resumed from a checkpoint, it has the records itself.
    Raises:
        ConfigError: there is no such source run, or it lacks one of these tasks.
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
            f"train.init_from = {config.train.init_from!r}: it has one model per task, so a new task "
            "is a new run: mode=single_task with the new task alone"
        )
    if missing := [name for name in kept if name not in resolved["tasks"]]:
        raise ConfigError(
            f"train.only = {config.train.only}: {', '.join(missing)} would be kept as in {config.train.init_from}, "
            f"which has only {', '.join(resolved['tasks'])}; train it too, or leave it out"
        )
    root = {"data_root": resolved["data_root"]} if "data_root" in resolved else {}
    return {name: root | resolved["tasks"][name] for name in kept}


def take_over(config: Config, run: Path) -> dict[str, dict[str, Any]]:
    """Copy the kept tasks' lists of images and report into this run's folder. Return `records`."""
    about = records(config, run)
    if about:
        with archive.opened(_source(config)) as source:
            copy_lists(source, run, list(about))
            for name, copy in (("report.json", SOURCE_REPORT), ("test_evaluations.log",) * 2):
                if files.kind(source / name) == "a file":
                    files.write_whole(run / copy, files.read_bytes(source / name))
    return about


def copy_lists(source: Path, run: Path, tasks: list[str]) -> None:
    """Copy the lists of images of these tasks, as far as the source run has them."""
    for task in tasks:
        file = data_record.list_of(source, task)
        if files.kind(file) == "a file":
            data_record.list_of(run, task).parent.mkdir(exist_ok=True)
            files.write_whole(data_record.list_of(run, task), files.read_bytes(file))


def entries(config: Config, run: Path, split: str) -> dict[str, dict[str, Any]]:
    """Return the kept tasks' entries for this run's report, taken from the source run's report.

    Args:
        split: split that this report is about. Scores on another split are left out.
    """
    try:
        report = json.loads(files.read_text(run / SOURCE_REPORT))
        reported, same = report["tasks"], report["split"] == split
    except (OSError, ValueError, KeyError, TypeError):
        reported, same = {}, False
    kept = {}
    for name in _kept(config):
        entry = reported.get(name, {})
        kept[name] = COUNTS | {key: value for key, value in entry.items() if same or key not in (*SCORED, "confusions")}
    return kept


def _kept(config: Config) -> list[str]:
    trained = set(config.trained_tasks())
    return [name for name in config.task_names() if name not in trained]


def _source(config: Config) -> Path:
    assert config.train.init_from is not None  # Config requires it if train.only is set
    return Path(config.train.init_from).expanduser()
