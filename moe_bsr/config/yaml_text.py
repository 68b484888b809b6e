"""Parse YAML text strictly: without surprising conversions, and with errors that name file, line and column.

Plain text is converted only if it is a decimal number, true or false (also yes and no, on and off), or null. YAML 1.1
would also convert octal (010), base 60 (12:30) and hexadecimal numbers, digits with underscores, and dates. These stay
text here, and are refused where a number is expected.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from moe_bsr.config.errors import ConfigError

# Limits of a file: far more than any configuration needs, and small enough that a larger file is refused quickly.
MOST_BYTES = 2**20
MOST_VALUES = 100_000  # each use of an alias counts
DEEPEST = 20  # levels of nesting

WHOLE = r"[-+]?(0|[1-9][0-9]*)"
EXPONENT = r"([eE][-+]?[0-9]+)?"
NUMBER = re.compile(rf"({WHOLE}(\.[0-9]*)?|[-+]?\.[0-9]+){EXPONENT}")

_TAG = "tag:yaml.org,2002:"
_REPLACED = {_TAG + kind for kind in ("int", "float", "timestamp")}


def json_text(value: Any, **options: Any) -> str:
    """Format a value as JSON that YAML reads as the same value. JSON's escapes of letters beyond U+FFFF are not YAML.

    Args:
        options: of `json.dumps`.
    """
    return json.dumps(value, ensure_ascii=False, **options)


def read_yaml(path: Path, what: str, until: str = "") -> Any:
    """Read the value of a YAML file.

    Args:
        what: description of the file in errors, such as "task file birds.yaml".
        until: the file is read up to the first occurrence of this text; "" means to the end.
    Raises:
        ConfigError: the file is not valid YAML, or not UTF-8.
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    data = data.partition(until.encode())[0] if until else data
    if len(data) > MOST_BYTES:
        size = path.stat().st_size
        raise ConfigError(f"{what} has {size:,} bytes: a configuration has at most {MOST_BYTES:,}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(_not_utf8(what, data, error.start)) from None
    if "\0" in text:  # ASCII text in UTF-16 without a byte order mark is also valid UTF-8
        raise ConfigError(_not_utf8(what, data, data.index(0)))
    return parse(text, what)


def _not_utf8(what: str, data: bytes, place: int) -> str:
    wide = "; it looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") or 0 in data else ""
    return (
        f"{what} is not UTF-8 (byte 0x{data[place]:02x} in line {data[:place].count(10) + 1}{wide}): "
        "save it as UTF-8 text"
    )


def parse(text: str, where: str) -> Any:
    """Parse a YAML text. `where` describes it in errors."""
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
    """Parse the value of a `key=value` override as YAML, except that a plain text may contain "#"."""
    text = text.strip()
    # YAML would read a comment after the "#".
    return text if re.search(r"(^|\s)#", text) and text[0] not in "\"'[{|>&*!" else parse(text, where)


def _located(error: yaml.MarkedYAMLError, text: str, where: str) -> str:
    """Return a one-line message: the file, line and column of the problem, and the line where the construct begins."""
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
    """YAML loader with the restrictions that the docstring of this module describes.

    It also refuses duplicate keys (the first value would be lost), tags (they convert a value) and aliases that expand
    to too many values.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    # Nesting is limited during parsing, because deep nesting takes long later or overflows Python's stack.

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
                continue  # cannot be a key: `construct_mapping` below refuses it
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
    return int(node.value) if len(node.value) < 4000 else node.value  # Python limits the digits that int() converts


_Strict.add_constructor(_TAG + "int", _construct_whole)


def _weigh(node: yaml.Node, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """Return how many values a node contains and how deep they are nested. Each use of an alias counts.

    Raises:
        MarkedYAMLError: there are too many values, they are nested too deep, or the node contains itself.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value) // 100, 0
    require(depth < DEEPEST, f"nested more than {DEEPEST} levels deep")
    if id(node) not in known:
        known[id(node)] = 0, 0  # marks the node while its parts are counted, to detect that it contains itself
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        weighed = [_weigh(part, known, depth + 1) for part in parts]
        known[id(node)] = 1 + sum(w for w, _ in weighed), 1 + max((height for _, height in weighed), default=0)
    weight, height = known[id(node)]
    require(weight > 0, "a value that holds itself")
    require(weight <= MOST_VALUES, f"aliases that repeat it to more than {MOST_VALUES:,} values")
    require(depth + height <= DEEPEST, f"nested more than {DEEPEST} levels deep")
    return weight, height
