"""Strict reading of YAML into dataclasses: nothing unknown, nothing guessed, errors that say what to do."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the key, the value and what is allowed."""


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise a ConfigError of the one form used everywhere unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} = {value!r}: {allowed}")


def nearest(word: Any, known: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """The end of an error about `word`: which of `known` was probably meant; empty if none is near."""
    near = difflib.get_close_matches(str(word), known, 1)
    return f"; did you mean {show(near[0])}?" if near else ""


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file merged over the one it `extends`, and so on; `seen` guards against circles."""
    if path.resolve() in seen:
        raise ConfigError(f"extends: {path} extends itself through {[p.name for p in seen]}")
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"no configuration file {path}{nearest(path.name, beside, str)}")
    tree = parse(path.read_text(), str(path)) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    require(isinstance(parent, str), "extends", parent, "the name of one YAML file beside this one")
    return _merge(read_tree(path.parent / parent, (*seen, path.resolve())), tree)


def parse(text: str, where: str) -> Any:
    """A YAML text as values; `where` names it in errors."""
    try:
        return yaml.load(text, _NoDuplicates)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None


class _NoDuplicates(yaml.SafeLoader):
    """YAML as usual, but a key written twice is refused: the first one would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{key}: written twice {node.start_mark}")
        return super().construct_mapping(node, deep)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c` in nested dictionaries, making what is missing on the way."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {section!r} is a value, not a section")
    tree[last] = value


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint` asks for, or a ConfigError that says what was expected."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return convert_section(value, hint, key)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return convert(value, option, key)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in arguments and type(value) is type(arguments[0]):
            return value
        names = [str(a) for a in arguments]
        raise ConfigError(f"{key} = {value!r}: one of {', '.join(names)}{nearest(value, names)}")
    elif origin is list and isinstance(value, (list, tuple)):
        return [convert(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value)]
    elif hint is dict and isinstance(value, dict):
        return value
    elif origin is dict and isinstance(value, dict):
        return {convert(k, arguments[0], key): convert(v, arguments[1], f"{key}.{k}") for k, v in value.items()}
    elif hint is types.NoneType and value is None:
        return None
    elif hint is float and isinstance(value, str) and _is_number(value):
        return float(value)  # YAML 1.1 reads 1e-3 as a string
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    raise ConfigError(f"{key} = {value!r}: expected {_describe(hint)}")


def convert_section(value: Any, cls: type, key: str, **given: Any) -> Any:
    """`value` as the dataclass `cls`, of which the caller sets the fields `given` and `value` may not."""
    if not isinstance(value, dict):
        raise ConfigError(f"{key} = {value!r}: expected a section with keys and values")
    hints = {name: hint for name, hint in typing.get_type_hints(cls).items() if name not in given}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            # A key of this section, or of one within it: steps may be meant for train.steps.
            paths = {
                inner: f"{section}.{inner}"
                for section, hint in hints.items()
                if dataclasses.is_dataclass(hint)
                for inner in typing.get_type_hints(hint)
            } | {here: here for here in hints}
            near = nearest(name, paths, {key: repr(prefix + path) for key, path in paths.items()}.__getitem__)
            raise ConfigError(f"unknown key {prefix}{name}{near} (allowed: {', '.join(hints) or 'none'})")
    for field in dataclasses.fields(cls):
        required = field.default is field.default_factory  # only MISSING is both
        if required and field.name in hints and field.name not in value:
            raise ConfigError(f"the key {prefix + field.name!r} is missing: expected {_describe(hints[field.name])}")
    return cls(**given, **{name: convert(item, hints[name], prefix + name) for name, item in value.items()})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return " or ".join(repr(option) for option in arguments)
    if origin is list:
        return f"a list of {_describe(arguments[0])}s"
    if origin is dict:
        return f"a mapping of names to {_describe(arguments[1])}"
    names = {
        dict: "mapping",
        int: "whole number",
        float: "number",
        bool: "true/false value",
        str: "text",
        types.NoneType: "null",
    }
    return names.get(hint, str(hint))
