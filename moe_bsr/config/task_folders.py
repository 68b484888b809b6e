"""Many tasks in one word: a pattern stands for the task files and folders it finds, a folder for a task of its images.

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
    """The entries of `tasks` with those that hold `*` or `?` replaced by what they find, sorted.

    Raises:
        ConfigError: one finds nothing that is a task.
    """
    entries = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(entries, list) or not any(map(_is_pattern, entries)):
        return tasks
    found: list[Any] = []
    for entry in entries:
        found += _matches(entry) if _is_pattern(entry) else [entry]
    return found


def is_folder(task: str) -> bool:
    """Whether an entry of `tasks` names a folder of images, and neither a task nor a task file."""
    return task.endswith("/") and task.strip("/.") != ""


def name_of(task: str) -> str:
    """The name of the task that an entry of `tasks` stands for."""
    if is_folder(task):
        return folder_name(task)
    return Path(task).stem if task.endswith(FILES) else task


def folder_name(folder: str | Path) -> str:
    """A folder's name as a task may be called."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(folder).name).strip("_") or "images"


def title_of(name: str) -> str:
    """What people read in place of such a name."""
    return name.replace("_", " ").strip().capitalize()


def _is_pattern(entry: Any) -> bool:
    return isinstance(entry, str) and ("*" in entry or "?" in entry)


def _matches(pattern: str) -> list[str]:
    places = sorted(glob(os.path.expanduser(pattern.replace("[", "[[]"))))  # only * and ? mean more than themselves
    found = [
        place if place.endswith(FILES) else place.rstrip("/") + "/"
        for place in places
        if os.path.isdir(place) or place.endswith(FILES)
    ]
    if not found:
        raise ConfigError(
            f"tasks: {show(pattern)} finds no folder and no {FILES[0]} file; a pattern is looked up from the current "
            f"folder, {show(os.getcwd())}"
        )
    return found
