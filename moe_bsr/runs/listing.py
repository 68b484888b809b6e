"""List the tasks of a run from its configuration and report. Neither the model nor the images are opened."""

import hashlib
from pathlib import Path
from typing import Any

from moe_bsr.runs import archive, report
from moe_bsr.runs.config_file import read_config


def tasks_of(run: Path) -> list[dict[str, Any]]:
    """Describe each task of a run.

    Returns:
        For each task: name, title, classes (their number), added (time in UTC), images (number by split), data_sha256
        (hash of the images' names, sizes and labels in all splits), val_top1 and test_top1 (percent). A value is None
        if the run does not have it.
    Raises:
        ConfigError: this is no run, or it is damaged.
    """
    with archive.opened(run) as folder:
        config, resolved = read_config(folder)
        about = resolved.get("tasks", {})
        if config.mode == "single_task":
            for task in config.task_names():
                if (folder / task / "config.yaml").is_file():
                    about |= read_config(folder / task)[1]["tasks"]
        found = report.read(folder) or {}
    scores, split = found.get("tasks", {}), found.get("split")
    return [_task(name, about.get(name, {}), scores.get(name, {}), split) for name in config.task_names()]


def _task(name: str, about: dict[str, Any], scores: dict[str, Any], split: str | None) -> dict[str, Any]:
    splits = about.get("splits", {})
    hashes = "".join(each["sha256"] for each in splits.values())
    return {
        "name": name,
        "title": about.get("spec", {}).get("title"),
        "classes": len(about["classes"]) if about else None,
        "added": about.get("added"),
        "images": {split: each["images"] for split, each in splits.items()},
        "data_sha256": hashlib.sha256(hashes.encode()).hexdigest() if hashes else None,
        "val_top1": scores.get("val_top1", scores.get("top1") if split == "val" else None),
        "test_top1": scores.get("top1") if split == "test" else None,
    }
