"""Configuration errors: one line of printable text that names the key, its value and what is allowed."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

LONGEST = 660  # characters; the middle of a longer message is left out


class ConfigError(ValueError):
    """A configuration is invalid. The message names the key, the value and what is allowed.

    The message is always a single line of printable characters of limited length, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        # Values come from files of unknown origin: line breaks and control characters must not reach a terminal.
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.splitlines()))
        super().__init__(message if len(message) <= LONGEST else f"{message[:480]} ... {message[-150:]}")


def show(value: Any) -> str:
    """Return the `repr` of a value. The middle of a long one is left out."""
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:120]} ... {text[-30:]}"


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise ConfigError("KEY = VALUE: ALLOWED") unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} = {show(value)}: {allowed}")


def require_within(name: str, section: Any, **limits: tuple[int, int]) -> None:
    """Raise ConfigError if a number of a section is outside its limits (least, most). None is accepted."""
    for key, (least, most) in limits.items():
        value = getattr(section, key)
        require(value is None or least <= value <= most, f"{name}.{key}", value, f"at least {least}, at most {most:,}")


def nearest(word: Any, known: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """Return the end of an error message: "; did you mean ...?" with the closest of `known`, or "" if none is close."""
    near = difflib.get_close_matches(str(word)[:100], known, 1)
    return f"; did you mean {show(near[0])}?" if near else ""
