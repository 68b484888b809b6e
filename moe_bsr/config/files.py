"""From a YAML file and `a.b=value` overrides to a checked configuration, and back to YAML."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import yaml

from moe_bsr.config.errors import ConfigError, show
from moe_bsr.config.reader import convert, make_way, read_tree, set_dotted
from moe_bsr.config.schema import Config
from moe_bsr.config.task_folders import expanded
from moe_bsr.config.yaml_text import parse_value


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML configuration with everything it extends, then apply `a.b=value` overrides.

    Args:
        path: a YAML file; or a run folder, for the configuration of that run.
    Raises:
        ConfigError: unreadable file, unknown key, wrong type or impossible value.
    """
    path = Path(path)
    if os.path.isfile(path / "config.json") and not os.path.lexists(path / "config.yaml"):
        raise ConfigError(
            f"{path} is a run that was shared: training does not go on in it; start another from it by "
            f"train.init_from={path}, or give it one task more"
        )
    return _overridden(read_tree(path / "config.yaml" if os.path.isdir(path) else path), overrides)


def override(config: Config, overrides: list[str]) -> Config:
    """A copy with `a.b=value` overrides, as `load` takes them. Checked again."""
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
    """Build a checked Config from nested dictionaries (as in a resolved `config.yaml`)."""
    if "tasks" in tree:
        tree = tree | {"tasks": expanded(tree["tasks"])}
    return convert(tree, Config, "")


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """The configuration as YAML, keys in the order of their definition."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def replace(config: Config, **changes: Any) -> Config:
    """A copy with changed values; keys as in `train__steps=10` reach into sections. Checked again."""
    return from_dict(_changed(to_dict(config), {key.replace("__", "."): value for key, value in changes.items()}))


def _changed(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The tree with the values of these dotted keys."""
    above: dict[str, Any] = {}
    for key, value in values.items():
        set_dotted(above, key, value)
    make_way(tree, above)
    for key, value in values.items():
        set_dotted(tree, key, value)
    return tree
