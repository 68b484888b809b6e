"""Registries: each lists the available kinds of one part (storage, adapter, ...) with their options.

A storage, a router, an adapter or a backbone family registers itself under a name. A configuration chooses one by that
name, or by a mapping with `kind` and options: `storage: recompute` or `adapter: {kind: lora, rank: 8}`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from moe_bsr.config.errors import ConfigError, nearest, require, show
from moe_bsr.config.reader import convert_section

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class NoOptions:
    """Options of a kind that has none."""


@dataclass(frozen=True)
class Choice:
    """A kind and its options, as a configuration chose them. Equal choices compare equal.

    Attributes:
        options: an instance of the dataclass that the kind registered.
    """

    kind: str
    options: Any = NoOptions()

    def __str__(self) -> str:
        options = dataclasses.asdict(self.options).items()
        given = ", ".join(f"{name}={value}" for name, value in options if value is not None)
        return f"{self.kind}({given})" if given else self.kind


class Registry(Generic[Entry]):
    """Mapping of kinds to entries.

    Args:
        key: configuration key that chooses among the kinds, for messages.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._entries: dict[str, tuple[Entry, type]] = {}

    def register(self, kind: str, options: type = NoOptions) -> Callable[[Entry], Entry]:
        """Return a decorator that registers an entry. It can also be called: `register(kind)(entry)`.

        Args:
            options: a frozen dataclass with a default for each option. Its `__post_init__` checks the values.
        """

        def add(entry: Entry) -> Entry:
            if kind in self._entries:
                raise ValueError(f"{self.key}: {kind!r} is registered already")
            self._entries[kind] = entry, options
            return entry

        return add

    def __getitem__(self, kind: str) -> Entry:
        return self._entries[kind][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def choose(self, value: Any) -> Choice:
        """Convert a configuration value, the name of a kind or {kind: NAME, option: value, ...}, to a choice.

        Raises:
            ConfigError: the kind or an option is unknown, or the value of an option is invalid.
        """
        options = {"kind": value} if isinstance(value, str) else value
        require(isinstance(options, dict) and "kind" in options, self.key, value,
                f"one of {', '.join(self)}, or a mapping with kind and its options")  # fmt: skip
        options = dict(options)
        kind = options.pop("kind")
        if not isinstance(kind, str) or kind not in self._entries:
            raise ConfigError(f"{self.key} = {show(kind)}: one of {', '.join(self)}{nearest(kind, self)}")
        return Choice(kind, convert_section(options, self._entries[kind][1], self.key))
