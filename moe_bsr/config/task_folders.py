"""Expand entries of `tasks`: a pattern stands for all task files and folders that match, a folder for a task.

tasks: photos/*              every folder in photos, and every .yaml file there
tasks: [photos/birds/, pets] a folder is written with a slash at its end
"""

import os
import re
from glob import glob
from pathlib import Path
from typing import Any

from moe_bsr.config.errors import ConfigError, show

FILES = (".yaml", ".yml")


def expanded(tasks: Any) -> Any:
    """Return the entries of `tasks`, with each pattern (`*` or `?`) replaced by its matches, sorted.

    Raises:
        ConfigError: no task matches a pattern.
    """
    entries = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(entries, list) or not any(map(_is_pattern, entries)):
        return tasks
    found: list[Any] = []
    for entry in entries:
        found += _matches(entry) if _is_pattern(entry) else [entry]
    return found


def is_folder(task: str) -> bool:
    """Return whether an entry of `tasks` is a folder of images, and not the name of a task or a task file."""
    return task.endswith("/") and task.strip("/.") != ""


def name_of(task: str) -> str:
    """Return the name of the task that an entry of `tasks` stands for."""
    if is_folder(task):
        return folder_name(task)
    return Path(task).stem if task.endswith(FILES) else task


def folder_name(folder: str | Path) -> str:
    """Turn the name of a folder into a valid name of a task."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(folder).name).strip("_") or "images"


def title_of(name: str) -> str:
    """Turn the name of a task into a title for people."""
    return name.replace("_", " ").strip().capitalize()


def _is_pattern(entry: Any) -> bool:
    return isinstance(entry, str) and ("*" in entry or "?" in entry)


def _matches(pattern: str) -> list[str]:
    places = sorted(glob(os.path.expanduser(pattern.replace("[", "[[]"))))  # only * and ? are special
    found = [
        place if place.endswith(FILES) else place.rstrip("/") + "/"
        for place in places
        if os.path.isdir(place) or place.endswith(FILES)
    ]
    if not found:
        raise ConfigError(
            f"tasks: {show(pattern)} matches no folder and no {FILES[0]} file; patterns start from the current folder, "
            f"{show(os.getcwd())}"
        )
    return found
