"""`config.yaml` of a run, read back: the configuration, and what it resolved to.

Of a shared run (`shared_form.py`) it is `config.json`.
"""

import copy
import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import yaml

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.runs import data_record, shared_form
from moe_bsr.runtime.version import __version__

# Sections that say how to train, and not what the model is or what it is fed.
TRAINING_SECTIONS = ("train", "sampler", "runtime")

# What a trained model is rebuilt from, and the last key written: without it the file was cut.
RESOLVED = ("backbone_sha256", "tasks", "precision", "python")


def read_config(run: Path, *, exact: bool = False) -> tuple[Config, dict[str, Any]]:
    """The configuration of a run and what it resolved to.

    Keys that another version wrote are left out with a warning where they say how to train, not what the model is.

    Args:
        exact: refuse them all: for whoever goes on training.
    Raises:
        ConfigError: there is no config.yaml, it is cut or damaged, or another version's.
    """
    file = run / (shared_form.CONFIG if shared_form.is_shared(run) else "config.yaml")
    if not file.is_file():
        raise ConfigError(f"{run} is not a run folder: it has no config.yaml")
    try:
        tree = shared_form.read(run)["run"] if file.name == shared_form.CONFIG else _parsed(file.read_text())
        if not isinstance(tree, dict):
            raise ConfigError("no keys and values")
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
            "train again into another folder"
        ) from error
    return config, resolved


def _parsed(text: str) -> Any:
    return copy.deepcopy(_parsed_once(text))


@functools.lru_cache(maxsize=1)
def _parsed_once(text: str) -> Any:
    """Going on with a run reads its file half a dozen times; of 200 tasks each would take a second."""
    return yaml.safe_load(text)


class OtherVersion(ConfigError):
    """A run of another version of moe_bsr, which this one cannot use."""


def _drop_unknown(file: Path, tree: dict[str, Any], resolved: dict[str, Any], exact: bool) -> None:
    """Take out of a run's configuration what this version does not know, or refuse it."""
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
            raise OtherVersion(f"{what}; use that version, or train again into another folder")
        warnings.warn(f"{what} and leaves out", stacklevel=4)
        del tree[section][key]


def _check_resolved(resolved: Any, config: Config) -> None:
    """Raise ConfigError where a trained model could not be rebuilt from it."""
    if lacking := [key for key in RESOLVED if key not in resolved]:
        raise ConfigError(f"no key resolved.{lacking[0]}")
    tasks = resolved["tasks"]
    if not isinstance(tasks, dict) or set(tasks) != set(config.task_names()):
        raise ConfigError(f"resolved.tasks does not describe the tasks {', '.join(config.task_names())}")
    for name, about in tasks.items():
        classes = about.get("classes") if isinstance(about, dict) else None
        if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(each, str) for each in classes):
            raise ConfigError(f"resolved.tasks.{name}.classes is no list of names")
        if wrong := data_record.problem(about):
            raise ConfigError(f"resolved.tasks.{name}.{wrong}")
