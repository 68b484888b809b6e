"""How a refusal is worded: one line of printable text that names the key, its value and what is allowed."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

LONGEST = 660  # characters of a message; what is longer loses its middle


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the key, the value and what is allowed.

    Whatever the message quotes, it stays one line of printable characters, short enough to be read.
    """

    def __init__(self, message: str) -> None:
        # Values come from files of anybody: line breaks and control letters must not reach a terminal.
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.splitlines()))
        super().__init__(message if len(message) <= LONGEST else f"{message[:480]} ... {message[-150:]}")


def show(value: Any) -> str:
    """`repr` of a value, without its middle if that is long."""
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:120]} ... {text[-30:]}"


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise a ConfigError of the one form used everywhere unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} = {show(value)}: {allowed}")


def require_within(name: str, section: Any, **limits: tuple[int, int]) -> None:
    """Refuse numbers of a section outside (least, most); null passes."""
    for key, (least, most) in limits.items():
        value = getattr(section, key)
        require(value is None or least <= value <= most, f"{name}.{key}", value, f"at least {least}, at most {most:,}")


def nearest(word: Any, known: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """The end of an error about `word`: which of `known` was probably meant; empty if none is near."""
    near = difflib.get_close_matches(str(word)[:100], known, 1)
    return f"; did you mean {show(near[0])}?" if near else ""
