"""Read YAML files into dataclasses, strictly: unknown keys and wrong types are errors that say what to do."""

import dataclasses
import math
import re
import types
import typing
import unicodedata
from pathlib import Path
from typing import Any, Literal

from moe_bsr.config.errors import ConfigError, nearest, require, show
from moe_bsr.config.train import LENGTHS
from moe_bsr.config.yaml_text import NUMBER, read_yaml

LONGEST_TEXT = 500  # characters of a name or a path
# Limits of the absolute value of a number. Beyond them float32 would underflow or overflow, in places hard to foresee.
SMALLEST, LARGEST = 1e-30, 1e30

# In a run's `config.yaml`, what follows this line records the settings that were resolved. It is not configuration.
RESOLVED = "\nresolved:"


class WrongType(ConfigError):
    """A value does not have the type that was tried. If a key may have several types, the next one is tried."""


def read_tree(path: Path, seen: tuple[Path, ...] = (), asked: str = "") -> dict[str, Any]:
    """Read a YAML file, merged over the file that it `extends`, and so on.

    Args:
        seen: the files that extend this one, to detect a cycle.
        asked: prefix of errors about a missing file: the `extends` that names it.
    """
    try:
        place, is_file = path.resolve(), path.is_file()
    except (OSError, ValueError) as error:  # the name is too long, or no file can have it
        raise ConfigError(
            f"{asked}no configuration file {show(str(path))}: {getattr(error, 'strerror', error)}"
        ) from None
    if place in seen:
        raise ConfigError(f"extends: {path} extends itself through {[p.name for p in seen]}")
    if not is_file:
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        key, is_override, _ = str(path).partition("=")
        if is_override:
            raise ConfigError(f"{asked}no configuration file {key}=...; name one before the overrides")
        raise ConfigError(f"{asked}no configuration file {path}{nearest(path.name, beside, str)}")
    tree = read_yaml(path, str(path), RESOLVED) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    require(isinstance(parent, str), "extends", parent, "the name of one YAML file beside this one")
    below = read_tree(path.parent / parent, (*seen, place), f"extends = {show(parent)}: ")
    make_way(below, tree)
    return _merge(below, tree)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def make_way(below: dict[str, Any], above: dict[str, Any]) -> None:
    """Remove the length of the run from `below` if `above` sets one: `epochs` there also replace `steps` here."""
    said, says = below.get("train"), above.get("train")
    if isinstance(said, dict) and isinstance(says, dict):
        if any(not isinstance(says.get(key), (dict, type(None))) for key in LENGTHS):
            below["train"] = {key: value for key, value in said.items() if key not in LENGTHS}


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted key `a.b.c` in nested dictionaries. Missing sections are created."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {section!r} is a value, not a section")
    tree[last] = value


def convert(value: Any, hint: Any, key: str) -> Any:
    """Convert `value` to the type `hint`. Raises ConfigError, which says what is expected."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return convert_section(value, hint, key)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return convert(value, option, key)
            except WrongType:
                continue
    elif origin is Literal:
        if value in arguments and type(value) is type(arguments[0]):
            return value
        names = [str(a) for a in arguments]
        raise WrongType(f"{key} = {show(value)}: one of {', '.join(names)}{nearest(value, names)}")
    elif origin is list and isinstance(value, (list, tuple)):
        return [convert(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value)]
    elif (
        isinstance(value, str) and origin is list and (hint == list[str] or typing.get_origin(arguments[0]) is Literal)
    ):
        return [convert(value, arguments[0], key)]
    elif hint is dict and isinstance(value, dict):
        return value
    elif origin is dict and isinstance(value, dict):
        return {convert(k, arguments[0], key): convert(v, arguments[1], f"{key}.{k}") for k, v in value.items()}
    elif hint is types.NoneType and value is None:
        return None
    elif hint is float and isinstance(value, str) and NUMBER.fullmatch(value):
        return _finite(float(value), key)  # YAML 1.1 reads 1e-3 as a string
    elif hint is float and type(value) in (int, float):
        return _finite(value, key)
    elif hint is int and type(value) is int:
        require(abs(value) < 2**63, key, value, "a whole number of at most 63 bits")
        return value
    elif hint is str and type(value) is str:
        require(len(value) <= LONGEST_TEXT, key, value, f"a text of at most {LONGEST_TEXT} characters")
        broken = any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in value)
        require(not broken, key, value, "a text without control characters")
        return value
    elif hint is bool and type(value) is bool:
        return value
    raise WrongType(f"{key} = {show(value)}: expected {_describe(hint)}{_misreading(value, hint)}")


def _finite(value: float, key: str) -> float:
    size = abs(value)
    require(size < math.inf, key, value, "expected a finite number")  # false for NaN too
    fits = size == 0 or SMALLEST <= size <= LARGEST
    require(fits, key, value, f"expected 0, or an absolute value from {SMALLEST} to {LARGEST}")
    return float(value)


# Values that YAML does not read as text -> (how they may have been written, an example to quote).
_NO_TEXT = {
    True: ("yes, on and true", "yes"),
    False: ("no, off and false", "no"),
    None: ("null, ~ and nothing", "null"),
}


def _misreading(value: Any, hint: Any) -> str:
    """Return the end of an error: why YAML may have read a value as another type than was meant, or ""."""
    kinds = {hint, *typing.get_args(hint)}
    if kinds & {str, list[str]} and (value is None or type(value) in (bool, int, float)):
        written, example = ("digits", str(value)) if type(value) in (int, float) else _NO_TEXT[value]
        return f"; YAML does not read {written} as text: write it in quotes, such as {show(example)}"
    if kinds & {int, float} and isinstance(value, str) and re.match(r"[-+]?\.?[0-9]", value):
        return "; write decimal digits, without leading zeros, colons, underscores, hexadecimal or units"
    return ""


def convert_section(value: Any, cls: type, key: str, **given: Any) -> Any:
    """Convert the dictionary `value` to the dataclass `cls`. The caller sets the fields `given`; `value` may not."""
    if not isinstance(value, dict):
        raise WrongType(f"{key} = {show(value)}: expected a section with keys and values")
    hints = {name: hint for name, hint in typing.get_type_hints(cls).items() if name not in given}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            # Suggest keys of this section and of those within it: `steps` may be meant for `train.steps`.
            paths = {
                inner: f"{section}.{inner}"
                for section, hint in hints.items()
                if dataclasses.is_dataclass(hint)
                for inner in typing.get_type_hints(hint)
            } | {here: here for here in hints}
            section, dot, inner = str(name).partition(".")
            if dot and dataclasses.is_dataclass(hints.get(section)):  # the form of the command line
                raise ConfigError(f"unknown key {prefix}{name}; in a file write {section}: {{{inner}: ...}}")
            near = nearest(name, paths, {key: repr(prefix + path) for key, path in paths.items()}.__getitem__)
            raise ConfigError(f"unknown key {prefix}{name}{near} (allowed: {', '.join(hints) or 'none'})")
    for field in dataclasses.fields(cls):
        required = field.default is field.default_factory  # true only if both are MISSING
        if required and field.name in hints and field.name not in value:
            raise ConfigError(f"the key {prefix + field.name!r} is missing: expected {_describe(hints[field.name])}")
    return cls(**given, **{name: convert(item, hints[name], prefix + name) for name, item in value.items()})


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
