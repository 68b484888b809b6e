"""Random changes to a configuration, its task files and its overrides.

Each change takes (draw, files, overrides), and modifies files or overrides in place. It returns a description, and
words of which a refusal must contain one.
"""

import dataclasses
import random
import re
import typing

from moe_bsr.config import Config
from moe_bsr.config.yaml_text import NUMBER
from moe_bsr.data.spec import SOURCES

Files = dict[str, bytes]
Change = tuple[str, list[str]]

NUMBERS = """0 1 2 3 7 -1 -0 1000000 1000000000 1000000000000 99999999999999999999999999 9223372036854775807
    9223372036854775808 -9223372036854775809 0.0 0.5 1.0 1.5 -0.5 1e-3 1.0e-9 1e-320 1.0e-320 4.9e-324 1.0e+300 1e400
    1.0e400 .inf -.inf .nan 010 0x10 0o17 0b101 12:30 1_000 1,5 50% 1e3 +3 3. .5 0.1.2""".split()
MILD = """exact bf16 int8 recompute recompute_int8 lora sgd none task_conditioned round_robin joint exhaust proportional
    across_tasks logits normalized null [5] [1,3] [] all single_task auto""".split()
TEXTS = r"""no yes on null ~ true '' 2024-01-01 é 日本 ../x / . .. /dev/null /dev/zero shapes [shapes] hub resnet18
    timm/deit_tiny meta "\ud800" "a\0b" "\e[31mred" "a\nb" $$ %s {0} '#' = a=b @x `x` !x *a | > - ?""".split()
TEXTS += ["' '", "a #b", "a: b", "!!int 3", "!!python/object/apply:os.system [ls]", "!!binary aGk=", "&a 3", "&a [*a]"]
TEXTS += ["x" * 300, "x" * 100_000, "9" * 5000, "-" * 50, "[" * 5000, "{a: " * 500]
SHAPES = """[]|[[]]|{}|[1]|[1, 1]|[0.5, 0.5]|[3, 1]|[-1]|[99]|[1.0]|[null]|[a, b]|[no]|[1, [2]]|{a: 1}|{kind: int8}
{kind: int8, bits: 4}|{kind: lora, rank: 0}|{kind: lora, rank: 1000000000}|{kind: lora, alpha: .nan}|{kind: [a]}
{kind: lora, layers: attn.qkv}|{kind: {a: 1}}|{blocks: [1]}|[{kind: int8, blocks: [1]}]|[{kind: int8, blocks: [99]}]
[{kind: int8}]|[{kind: lora, blocks: 1}]|[&a [x, x], [*a, *a]]|{shapes: 0}|{shapes: .inf, petals: 1}|{shape: 1}
{no: 1}|{1: 2}""".replace("\n", "|").split("|")
SHAPES += [f"[{'1, ' * 2000}1]"]
MARKS = ["\t", "  ", "\r", "\x00", "\x07", "\x1b", "\u2028", "\ufeff", "---\n", "...\n", "%YAML 1.2\n", "? ", "<<: "]
MARKS += list(":[]{}'\"#&*!|-")
KEY_NAMES = ["?", "3", "no", "~", "x" * 5000, '"\\e[31m"', "[a]", "a b", "<<"]
OVERRIDES = ["{key}={value}"] * 12 + [".{key}={value}", "{key}", "{key}.={value}", "{key}..x={value}", "={value}"]
OVERRIDES += ["{key} {value}", "{key}.more={value}", "{section}={value}", "x{key}={value}", "{last}={value}"]
OVERRIDES += [" {key} = {value} "]
PARENTS = r"""config.yaml nowhere.yaml petals.yaml . .. / /dev/zero "a\0b" [a] null 3 ''""".split() + ["x" * 300]
ENTRIES = (
    r"""nowhere nowhere.yaml ../petals.yaml config.yaml /dev/zero train [a] a/b tasks/../shapes.yaml "a\0.yaml"
    shapes.yaml,shapes.yaml""".split()
    + ["x" * 300, ""]
)


def _keys(cls: type, prefix: str = "") -> list[str]:
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        found += _keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return found


KEYS = _keys(Config)
TASK_KEYS = sorted({key for kind in SOURCES for key in _keys(SOURCES[kind])} - {"name"} | {"source"})


def _any_value(draw: random.Random) -> str:
    return draw.choice(draw.choice((NUMBERS, NUMBERS, TEXTS, SHAPES)))


def _neighbor(draw: random.Random, value: str) -> str:
    """Return a value like this one, which may be valid."""
    if value in ("true", "false"):
        return draw.choice(("true", "false"))
    if NUMBER.fullmatch(value):
        number = float(value)
        if "." in value:
            return repr(draw.choice((2 * number, number / 2, 0.9, number / 100, 1.0)))
        return str(int(draw.choice((number + 1, 2 * number, max(number - 1, 0), 1))))
    return draw.choice(MILD)


def _short(text: str) -> str:
    return text if len(text) < 60 else f"{text[:40]}... ({len(text)} characters)"


def _value(draw: random.Random, files: Files, overrides: list[str]) -> Change:
    """Give another value to an existing key."""
    name = draw.choice(("config.yaml", "config.yaml", *files))
    places = list(re.finditer(rb"(\w+): +([^\s{}\[\],]+|\[[^\]]*\]|\{[^}]*\})", files[name]))
    if not places:
        return _bytes(draw, files, overrides)
    place = draw.choice(places)
    key = place[1].decode()
    value = _neighbor(draw, place[2].decode(errors="replace")) if draw.random() < 0.5 else _any_value(draw)
    files[name] = files[name][: place.start(2)] + value.encode("utf-8") + files[name][place.end(2) :]
    return f"{name}: {key} is {_short(value)}", [key, name, name.removesuffix(".yaml")]


def _override(draw: random.Random, files: Files, overrides: list[str]) -> Change:
    """Add an override key=value, sometimes malformed."""
    key, value = draw.choice(KEYS), _any_value(draw)
    if draw.random() < 0.4:
        value = draw.choice((_neighbor(draw, draw.choice(("1", "0.5", "true", "x"))), "2", "1.0"))
    text = draw.choice(OVERRIDES).format(key=key, value=value, section=key.split(".")[0], last=key.split(".")[-1])
    text = text.replace("\0", "")
    overrides.append(text[:100_000])  # the longest argument a program can have is 128 KiB
    return f"override {_short(text)}", [*key.split("."), "override", text[:20]]


def _key(draw: random.Random, files: Files, overrides: list[str]) -> Change:
    """Misspell a key, or replace it by another one."""
    name = draw.choice(list(files))
    places = list(re.finditer(rb"(\w+):", files[name]))
    if not places:
        return _bytes(draw, files, overrides)
    place = draw.choice(places)
    key = place[1].decode()
    i = draw.randrange(len(key))
    spelled = [key[:i] + key[i + 1 :], key[:i] + key[i] + key[i:], key.upper(), draw.choice([*KEYS, *TASK_KEYS])]
    new = draw.choice([*spelled, draw.choice(KEY_NAMES)])
    files[name] = files[name][: place.start(1)] + new.encode() + files[name][place.end(1) :]
    return f"{name}: key {key} is {_short(new)}", [key, name, name.removesuffix(".yaml"), new[:20]]


def _line(draw: random.Random, files: Files, overrides: list[str]) -> Change:
    """Remove, repeat, exchange, indent, cut or join lines."""
    name = draw.choice(list(files))
    lines = files[name].split(b"\n")
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    what = draw.choice(("without", "twice", "exchanged with another", "indented", "with a tab", "cut short", "joined"))
    touched = [lines[i], lines[j]]
    if what == "without":
        del lines[i]
    elif what == "twice":
        lines.insert(j, lines[i])
    elif what == "exchanged with another":
        lines[i], lines[j] = lines[j], lines[i]
    elif what == "joined":
        lines[i : i + 2] = [b" ".join(lines[i : i + 2])]
    else:
        lines[i] = {
            "indented": draw.choice((b" ", b"   ")) + lines[i],
            "with a tab": b"\t" + lines[i].lstrip(),
            "cut short": lines[i][: len(lines[i]) // 2],
        }[what]
    files[name] = b"\n".join(lines)
    keys = [key.decode() for line in touched for key in re.findall(rb"(\w+):", line)]
    return f"{name}: line {i + 1} {what}", [name, name.removesuffix(".yaml"), *keys]


def _text(draw: random.Random, files: Files, overrides: list[str]) -> Change:
    """Insert a mark somewhere in the text."""
    name = draw.choice(list(files))
    text = files[name].decode("utf-8", "replace")
    place, mark = draw.randrange(len(text) + 1), draw.choice(MARKS)
    files[name] = (text[:place] + mark + text[place:]).encode()
    line = text[text.rfind("\n", 0, place) + 1 :].split("\n")[0]
    keys = re.findall(r"\w+", line)
    return f"{name}: {mark!r} in {_short(line)!r}", [name, name.removesuffix(".yaml"), *keys]


def _bytes(draw: random.Random, files: Files, overrides: list[str]) -> Change:
    """Write the whole file in another form, cut it, or change bytes of it."""
    name = draw.choice(list(files))
    content = files[name]
    text = content.decode("utf-8", "replace")
    bomb = "\n".join(["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)])
    i = draw.randrange(len(content) + 1)
    forms = {
        "UTF-16": lambda: text.encode("utf-16"),
        "UTF-16 without its mark": lambda: text.encode("utf-16-le"),
        "Latin-1": lambda: b"# f\xfcr\n" + content,
        "BOM": lambda: b"\xef\xbb\xbf" + content,
        "CRLF": lambda: content.replace(b"\n", b"\r\n"),
        "CR": lambda: content.replace(b"\n", b"\r"),
        "cut": lambda: content[:i],
        "random bytes": lambda: draw.randbytes(200),
        "empty": lambda: b"",
        "twice": lambda: content + content,
        "a list": lambda: b"- a\n- b\n",
        "a text": lambda: b"just words",
        "deep": lambda: content + b"x: " + b"[" * 3000,
        "bomb": lambda: content + bomb.encode(),
        "other bytes": lambda: content[:i] + draw.randbytes(3) + content[i + 3 :],
    }
    what = draw.choice(list(forms))
    files[name] = forms[what]()
    keys = re.findall(r"\w+", text[max(0, i - 30) : i + 30]) if what in ("cut", "other bytes") else []
    return f"{name}: {what}", [name, name.removesuffix(".yaml"), *keys, *(["a0"] if what == "bomb" else [])]


def _extends(draw: random.Random, files: Files, overrides: list[str]) -> Change:
    """Name an impossible task file, or extend an impossible configuration."""
    if draw.random() < 0.3:
        entry = draw.choice(ENTRIES)
        changed = re.sub(rb"tasks: \[[^\]]*", lambda _: b"tasks: [" + entry.encode(), files["config.yaml"])
        files["config.yaml"] = changed
        return f"tasks: {_short(entry)}", ["task", entry[:20]]
    parent = draw.choice(PARENTS)
    files["config.yaml"] = f"extends: {parent}\n".encode() + files["config.yaml"]
    return f"extends: {_short(parent)}", ["extends", "config.yaml", "title", parent[:20]]


CHANGES = [_value] * 4 + [_override] * 2 + [_key, _line, _text, _bytes, _extends]


def change(draw: random.Random, files: Files, overrides: list[str]) -> Change:
    """Make one change of a random kind."""
    return draw.choice(CHANGES)(draw, files, overrides)
