"""YAML text as values, strictly: nothing is turned into something else, and an error names file, line and column.

Of YAML 1.1's readings of plain text, only decimal numbers, true and false (yes and no), and null are kept. What it
would take for octal (010), base 60 (12:30), hexadecimal, digits with underscores or a date stays text, and is
refused where a number is expected.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from moe_bsr.config.errors import ConfigError

# What a file may hold: far beyond any configuration, and little enough to be refused at once.
MOST_BYTES = 2**20
MOST_VALUES = 100_000  # aliases counted as often as they are used
DEEPEST = 20

WHOLE = r"[-+]?(0|[1-9][0-9]*)"
EXPONENT = r"([eE][-+]?[0-9]+)?"
NUMBER = re.compile(rf"({WHOLE}(\.[0-9]*)?|[-+]?\.[0-9]+){EXPONENT}")

_TAG = "tag:yaml.org,2002:"
_REPLACED = {_TAG + kind for kind in ("int", "float", "timestamp")}


def read_yaml(path: Path, what: str, until: str = "") -> Any:
    """The values of a YAML file.

    Args:
        what: names the file in errors, such as "task file birds.yaml".
        until: a text from which on the file is not read, if it holds it.
    Raises:
        ConfigError: no YAML, or not in UTF-8. OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    data = data.partition(until.encode())[0] if until else data
    if len(data) > MOST_BYTES:
        size = path.stat().st_size
        raise ConfigError(f"{what} has {size:,} bytes: no configuration is larger than {MOST_BYTES:,}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(_not_utf8(what, data, error.start)) from None
    if "\0" in text:  # UTF-16 of plain letters without its mark is also valid UTF-8
        raise ConfigError(_not_utf8(what, data, data.index(0)))
    return parse(text, what)


def _not_utf8(what: str, data: bytes, place: int) -> str:
    wide = "; it looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") or 0 in data else ""
    return (
        f"{what} is not UTF-8 (byte 0x{data[place]:02x} in line {data[:place].count(10) + 1}{wide}): "
        "save it as UTF-8 text"
    )


def parse(text: str, where: str) -> Any:
    """A YAML text as values; `where` names it in errors."""
    loader = None
    try:
        loader = _Strict(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_located(error, text, where)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise ConfigError(f"{where}, line {line}: the character U+{code:04X} is not allowed in YAML") from None
    finally:
        if loader is not None:
            loader.dispose()


def parse_value(text: str, where: str) -> Any:
    """The value of a `key=value` override: YAML, but plain text is taken whole, "#" included."""
    text = text.strip()
    # YAML would take what follows a "#" for a comment.
    return text if re.search(r"(^|\s)#", text) and text[0] not in "\"'[{|>&*!" else parse(text, where)


def _located(error: yaml.MarkedYAMLError, text: str, where: str) -> str:
    """One line: the file, the line and column of the problem, and where what was being read had begun."""
    problem, mark, begun = error.problem or error.context, error.problem_mark or error.context_mark, error.context_mark
    if mark is None:
        return f"{where}: not valid YAML: {problem}"
    line = (text.splitlines() or [""])[min(mark.line, len(text.splitlines()) - 1)] if text else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in str(problem):
        problem = "found a tab where spaces are needed"
    elif begun is not None and begun.line != mark.line:
        problem = f"{problem} ({error.context}, which begins in line {begun.line + 1})"
    return f"{where}, line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {problem}"


class _Strict(yaml.SafeLoader):
    """YAML as usual, without the surprises: see this file's first lines.

    A key written twice is refused, for the first one would be lost silently; so are tags, which make something
    else of a value, and aliases that multiply.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    # Nesting is bounded while text is read: further on it would take a long time, or all of Python's stack.

    def fetch_flow_collection_start(self, token: type) -> None:
        self._check_depth(self.flow_level)
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        self._check_depth(len(self.indents))
        return super().add_indent(column)

    def _check_depth(self, depth: int) -> None:
        if depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEEPEST} levels deep", problem_mark=self.get_mark())

    def get_event(self) -> yaml.Event:
        event = super().get_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem=f"tags such as {event.tag} are not read", problem_mark=event.start_mark)
        return event

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _weigh(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[tuple[str, str], yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # cannot be a key, and will be refused as one
            begun = first.setdefault((key.tag, key.value), key.start_mark)
            if begun is not key.start_mark:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is written twice, first in line {begun.line + 1}",
                    problem_mark=key.start_mark,
                )
        return super().construct_mapping(node, deep)


for _kind, _pattern in (
    ("int", rf"{WHOLE}$"),
    ("float", rf"({WHOLE}\.[0-9]*|[-+]?\.[0-9]+){EXPONENT}$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
):
    _Strict.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), list("-+.0123456789"))


def _construct_whole(loader: _Strict, node: yaml.ScalarNode) -> int | str:
    return int(node.value) if len(node.value) < 4000 else node.value  # Python converts no longer ones


_Strict.add_constructor(_TAG + "int", _construct_whole)


def _weigh(node: yaml.Node, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """How many values a node holds and how deep they are nested, each alias followed as often as it is used.

    Raises:
        MarkedYAMLError: too many, too deep, or the node holds itself.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value) // 100, 0
    require(depth < DEEPEST, f"nested more than {DEEPEST} levels deep")
    if id(node) not in known:
        known[id(node)] = 0, 0  # for as long as its parts are weighed
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        weighed = [_weigh(part, known, depth + 1) for part in parts]
        known[id(node)] = 1 + sum(w for w, _ in weighed), 1 + max((height for _, height in weighed), default=0)
    weight, height = known[id(node)]
    require(weight > 0, "a value that holds itself")
    require(weight <= MOST_VALUES, f"aliases that repeat it to more than {MOST_VALUES:,} values")
    require(depth + height <= DEEPEST, f"nested more than {DEEPEST} levels deep")
    return weight, height
