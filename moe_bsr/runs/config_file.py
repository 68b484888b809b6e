"""Read a run's `config.yaml`: the configuration, and what it resolved to.

A shared run (`shared_form.py`) has `config.json` in its place.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import yaml

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.config.reader import nearest
from moe_bsr.runs import data_record, shared_form
from moe_bsr.runtime.version import __version__

# Sections that say how to train. They change neither the model nor its inputs.
TRAINING_SECTIONS = ("train", "sampler", "runtime")

# The loader in C if PyYAML has it: ten times as fast on a run's hundreds of keys and class names.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Keys needed to rebuild a trained model. "python" is the last key written: without it the file was truncated.
RESOLVED = ("backbone_sha256", "tasks", "precision", "python")


def read_config(run: Path, *, exact: bool = False) -> tuple[Config, dict[str, Any]]:
    """Return the configuration of a run, and what it resolved to.

    Unknown keys of another version are ignored with a warning if they only say how to train. Others are refused.

    Args:
        exact: whether to refuse all unknown keys, as needed to resume training.
    Raises:
        ConfigError: there is no config.yaml, it is cut or damaged, or of another version.
    """
    file = run / (shared_form.CONFIG if shared_form.is_shared(run) else "config.yaml")
    if not file.is_file():
        inside = sorted(str(found.parent) for found in run.glob("*/config.yaml"))
        runs = f"; runs in it: {', '.join(inside[:8])}{', ...' if len(inside) > 8 else ''}" if inside else ""
        lacks = "it has no config.yaml" if run.exists() else "it does not exist"
        raise ConfigError(f"{run} is not a run folder: {lacks}{runs}")
    try:
        tree = shared_form.read(run)["run"] if file.name == shared_form.CONFIG else yaml.load(file.read_text(), _Loader)
        if not isinstance(tree, dict):
            raise ConfigError("it has no keys and values")
        resolved = tree.pop("resolved", None) or {}
        _drop_unknown(file, tree, resolved, exact)
        config = configuration.from_dict(tree)
        if config.mode != "single_task":
            _check_resolved(resolved, config)
    except OtherVersion:
        raise
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{file}: cut or damaged: {' '.join(str(error).split())}; put a copy in its place, or "
            "train again in another folder"
        ) from error
    return config, resolved


def chosen_tasks(asked: list[str] | None, known: list[str]) -> list[str]:
    """Return the tasks in `asked`, each once, or all known tasks if there are none.

    Raises:
        ValueError: a task is unknown. The message has the known ones and the most similar name.
    """
    for task in asked or []:
        if task not in known:
            raise ValueError(f"no task {task!r}: this run has {', '.join(known)}{nearest(task, known, str)}")
    return list(dict.fromkeys(asked or known))


class OtherVersion(ConfigError):
    """The run was written by another version of moe_bsr, and this version cannot use it."""


def _drop_unknown(file: Path, tree: dict[str, Any], resolved: dict[str, Any], exact: bool) -> None:
    """Remove keys unknown to this version from a run's configuration, or refuse them."""
    known = configuration.to_dict(Config())
    sections = {each.name for each in dataclasses.fields(Config) if dataclasses.is_dataclass(each.type)}
    unknown = [(key, None) for key in tree if key not in known] + [
        (section, key)
        for section in sections & tree.keys()
        for key in (tree[section] if isinstance(tree[section], dict) else ())
        if key not in known[section]
    ]
    for section, key in unknown:
        version = resolved.get("version", "older")
        what = (
            f"{file}: written by another version of moe_bsr ({version}, this is {__version__}): it has the key "
            f"{section if key is None else f'{section}.{key}'}, which this one does not know"
        )
        if exact or section not in TRAINING_SECTIONS:
            raise OtherVersion(f"{what}; use that version, or train again in another folder")
        warnings.warn(f"{what}; it is ignored", stacklevel=4)
        del tree[section][key]


def _check_resolved(resolved: Any, config: Config) -> None:
    """Raise ConfigError if a trained model cannot be rebuilt from `resolved`."""
    if lacking := [key for key in RESOLVED if key not in resolved]:
        raise ConfigError(f"it has no key resolved.{lacking[0]}")
    tasks = resolved["tasks"]
    if not isinstance(tasks, dict) or set(tasks) != set(config.task_names()):
        raise ConfigError(f"resolved.tasks does not describe the tasks {', '.join(config.task_names())}")
    for name, about in tasks.items():
        classes = about.get("classes") if isinstance(about, dict) else None
        if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(each, str) for each in classes):
            raise ConfigError(f"resolved.tasks.{name}.classes is not a list of names")
        if wrong := data_record.problem(about):
            raise ConfigError(f"resolved.tasks.{name}.{wrong}")
