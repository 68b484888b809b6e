"""Read a configuration from a YAML file and `a.b=value` overrides, check it, and write it as YAML."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moe_bsr.config import packaged
from moe_bsr.config.errors import ConfigError, show
from moe_bsr.config.reader import convert, make_way, read_tree, set_dotted
from moe_bsr.config.schema import Config
from moe_bsr.config.task_folders import expanded
from moe_bsr.config.yaml_text import json_text, parse_value


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML configuration and the files that it extends, then apply `a.b=value` overrides.

    Args:
        path: a YAML file, or a run folder, whose configuration is read. A file that is not there is taken from the
            package, as `configs/quickstart.yaml` is.
    Raises:
        ConfigError: the file cannot be read, or a key is unknown, or a value is invalid.
    """
    path = Path(path)
    if not os.path.isfile(path) and not os.path.isfile(path / "config.yaml"):
        path = packaged.find("configs", path) or path
    if os.path.isfile(path / "config.json") and not os.path.lexists(path / "config.yaml"):
        raise ConfigError(
            f"{path} is a shared run, which cannot be trained further; start a new run from it with "
            f"train.init_from={path}, or add a task to it"
        )
    return _overridden(read_tree(path / "config.yaml" if os.path.isdir(path) else path), overrides)


def override(config: Config, overrides: list[str]) -> Config:
    """Return a checked copy with `a.b=value` overrides, in the form that `load` accepts."""
    return _overridden(to_dict(config), overrides)


def _overridden(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> Config:
    values = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            raise ConfigError(f"override {show(text)}: write key=value, for example train.steps=200")
        values[key] = parse_value(value, key)
    return from_dict(_changed(tree, values))


def from_dict(tree: dict[str, Any]) -> Config:
    """Build a checked Config from nested dictionaries, such as those of a run's `config.yaml`."""
    if "tasks" in tree:
        tree = tree | {"tasks": expanded(tree["tasks"])}
    return convert(tree, Config, "")


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """Return the configuration as YAML, with the keys in the order of their definition."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return the values of dotted keys as `a.b=value` overrides, in the form that `load` accepts."""
    texts = {k: v if isinstance(v, str) else json_text(v, separators=(",", ":")) for k, v in values.items()}
    return [f"{key}={text}" for key, text in texts.items()]


def replace(config: Config, **changes: Any) -> Config:
    """Return a checked copy with changed values. `train__steps=10` or `**{"train.steps": 10}` reach into a section."""
    return from_dict(_changed(to_dict(config), {key.replace("__", "."): value for key, value in changes.items()}))


def _changed(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Set dotted keys in `tree`, and return it. A new length of the run replaces a length in another unit."""
    above: dict[str, Any] = {}
    for key, value in values.items():
        set_dotted(above, key, value)
    make_way(tree, above)
    for key, value in values.items():
        set_dotted(tree, key, value)
    return tree
