"""The rooms of the package: imports go downwards only, and every room keeps to its own trade.

Everything is read from the source (`ast`); nothing is imported. An import inside a function counts too.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moe_bsr"
FILES = sorted(PACKAGE.rglob("*.py"))

# Top floor first. A room may import from the floors below its own; rooms on one floor do not know each other.
FLOORS = [
    {"cli"},
    {"selftest", "study"},
    {"fit"},
    {"api"},
    {"benchmark", "paper", "export"},
    {"callbacks"},
    {"visualize"},
    {"cost"},
    {"training"},
    {"runs"},
    {"evaluation"},
    {"model"},
    {"ops"},
    {"data"},
    {"runtime"},
    {"config"},
]
FLOOR = {room: len(FLOORS) - level for level, rooms in enumerate(FLOORS) for room in rooms}

# Beyond the floors: what a room does not know although it lies below, and rooms that only the named ones may know.
NOT_KNOWN = {"model": {"data"}, "ops": {"data"}, "export": {"training", "cost", "visualize", "callbacks"}}
KNOWN_BY = {"paper": {"cli"}, "benchmark": {"cli"}}

# Where private names of torch and timm may be used: the fast kernels, timm's ViT, and what measures or traces torch.
PRIVATE_NAMES_ALLOWED = ("ops/", "model/backbones/vit.py", "benchmark/", "cost/")

# (file, what) -> why it is right all the same.
PRIVATE_NAMES_ELSEWHERE = {
    ("data/sources/torchvision_datasets.py", "_labels"): "torchvision has no public name for its datasets' labels",
    ("model/layers.py", "_backward_hooks"): "a layer with hooks is called, not opened; torch has no public question",
    ("model/layers.py", "_backward_pre_hooks"): "as above",
    ("model/layers.py", "_forward_hooks"): "as above",
    ("model/layers.py", "_forward_pre_hooks"): "as above",
    ("model/storage/by_kind.py", "_base"): "a view is packed once, with what it is a view of",
    ("model/storage/by_kind.py", "_version"): "a tensor changed after it was saved must not be restored",
    ("runtime/cpu_features.py", "torch.ops"): "what this CPU can do has no public name",
    ("runtime/cpu_features.py", "_is_mkldnn_bf16_supported"): "what this CPU can do has no public name",
    ("runtime/device.py", "_fast_norm"): "timm's public switch of its norms is for the whole process",
    ("selftest/ranks.py", "_exit"): "public: a fork must not clean up what its parent still uses",
    ("selftest/kills.py", "_exit"): "public: a fork must not clean up what its parent still uses",
    (
        "selftest/sandbox.py",
        "_exit",
    ): "public: a fork must not clean up what its parent still uses",
    ("training/optim.py", "_foreach_lerp_"): "one call for all averaged parameters; there is no public one",
}
FLAGS_ELSEWHERE = {
    ("export/card.py", "--check"): "a flag of the bundle's own program",
    ("export/card.py", "--time"): "a flag of the bundle's own program",
    ("export/on_device.py", "--task"): "a flag of its own",
    ("export/on_device.py", "--check"): "a flag of its own",
    ("export/on_device.py", "--time"): "a flag of its own",
    ("benchmark/method_page.py", "--from-json"): "the page says by which command it was made",
    ("benchmark/method_page.py", "--markdown"): "the page says by which command it was made",
    ("benchmark/method_page.py", "--out"): "the page says by which command it was made",
    ("benchmark/method_page.py", "--train"): "the page says by which command it was made",
    ("paper/page.py", "--markdown"): "the page says by which command it was made",
    ("paper/page.py", "--mode"): "the page says by which command a figure can be had",
}
# The program that a bundle takes to the device stands alone there: it is its own command line.
PROGRAMS = {("export/on_device.py", "argparse"): "see above", ("export/on_device.py", "print"): "see above"}
MAX_LINES = 350
LONGER: dict[str, str] = {}  # file -> why

# What is on its way to the right room. To be empty.
MOVING: set[tuple[str, str]] = set()


def name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def room(file: Path) -> str:
    """The folder in `moe_bsr/`, or for a file there its own name; "" for __init__ and __main__, which are doors."""
    top = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if top in ("__init__", "__main__") else top


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path) -> Iterator[tuple[str, list[str]]]:
    """(module, names taken from it) of every import statement, wherever it stands."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield ("." * node.level) + (node.module or ""), [alias.name for alias in node.names]


def rooms_imported(file: Path) -> set[str]:
    found = set()
    for module, names in imports(file):
        first, *rest = module.split(".")
        if first == "moe_bsr":
            found |= {rest[0]} if rest else set(names) & FLOOR.keys()
    return found - {room(file)}


def arrows() -> set[tuple[str, str]]:
    """(file, room it imports from) for every import between rooms."""
    return {(name(file), other) for file in FILES for other in rooms_imported(file) if room(file)}


def wrong_arrow(file: str, other: str) -> bool:
    here = file.split("/")[0].removesuffix(".py")
    if FLOOR[other] >= FLOOR[here] or other in NOT_KNOWN.get(here, ()):
        return True
    return other in KNOWN_BY and here not in KNOWN_BY[other]


def report(found: set[tuple[str, str]], kept: dict, what: str) -> None:
    """Fail on what is new, and on exceptions that are none any more: the list only shrinks."""
    new, gone = sorted(found - set(kept) - MOVING), sorted(set(kept) - found)
    assert not new, f"{what}: {new}"
    assert not gone, f"{what}: no longer so, take it off the list: {gone}"


def test_every_room_has_a_floor():
    assert {room(file) for file in FILES} - {""} <= FLOOR.keys()
    banned = {"utils", "util", "common", "helpers", "misc"}
    assert not [name(file) for file in FILES if banned & {part.removesuffix(".py") for part in file.parts}]


def test_imports_are_absolute():
    assert not [name(file) for file in FILES for module, _ in imports(file) if module.startswith(".")]


def test_imports_go_downwards_only():
    report({arrow for arrow in arrows() if wrong_arrow(*arrow)}, {}, "imports upwards")


def test_no_room_but_the_command_line_comes_in_by_the_front_door():
    """What `moe_bsr` itself offers stands above every room."""
    found = [
        (name(file), module, names)
        for file in FILES
        if room(file) not in ("", "cli")
        for module, names in imports(file)
        if module == "moe_bsr" and not set(names or ["moe_bsr"]) <= FLOOR.keys()
    ]
    assert not found


def test_tests_mirror_the_rooms():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    assert folders <= FLOOR.keys() | {"gpu"}  # what needs a GPU lies together


def test_no_file_takes_private_names_from_another():
    found = {
        (name(file), private)
        for file in FILES
        for module, names in imports(file)
        if module.split(".")[0] == "moe_bsr"
        for private in [*names, *module.split(".")]
        if private.startswith("_") and not private.endswith("__")
    }
    report(found, {}, "private names of another file")


@cache
def own_private_names() -> set[str]:
    """Every name with a leading underscore that the package itself defines."""
    found: set[str] = set()
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                found.add(node.attr)
    return {each for each in found if each.startswith("_")}


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(word: str) -> bool:
    return word.startswith("_") and not word.endswith("__")


def foreign_private_names(file: Path) -> Iterator[str]:
    """Private names of other people's code: imported, reached as an attribute, or asked for with getattr."""
    for module, names in imports(file):
        if not module.startswith("moe_bsr"):
            parts = [*module.split("."), *names]
            if any(map(is_private, parts)) or parts[:2] == ["torch", "ops"] or module == "torch.ops":
                yield ".".join(parts)
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute):
            if node.attr == "ops" and isinstance(node.value, ast.Name) and node.value.id == "torch":
                yield "torch.ops"
            elif is_private(node.attr) and node.attr not in own_private_names() | NAMEDTUPLE:
                yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFLECTION:
            words = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            yield from (word for word in words if isinstance(word, str) and is_private(word))


NAMEDTUPLE = {"_replace", "_asdict", "_fields"}  # public in spite of the underscore
REFLECTION = {"getattr", "setattr", "hasattr", "delattr"}


def test_private_names_of_others_stay_behind_one_door():
    found = {
        (name(file), word)
        for file in FILES
        if not name(file).startswith(PRIVATE_NAMES_ALLOWED)
        for word in foreign_private_names(file)
    }
    report(found, PRIVATE_NAMES_ELSEWHERE, "private names of other packages")


def below_the_command_line() -> list[Path]:
    return [file for file in FILES if room(file) not in ("", "cli")]


def test_nothing_below_the_command_line_prints_or_parses():
    found = set()
    for file in below_the_command_line():
        if {"argparse"} & {module.split(".")[0] for module, _ in imports(file)}:
            found.add((name(file), "argparse"))
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Name) and node.id == "print":
                found.add((name(file), "print"))
            if isinstance(node, ast.Attribute) and node.attr == "argv":
                found.add((name(file), "sys.argv"))
    report(found, PROGRAMS, "the command line's trade")


def test_nothing_below_the_command_line_speaks_of_flags():
    """A message names the argument or the key; the command line says which flag that is.

    A string that is a flag and nothing else is an argument of another program (git).
    """
    flag = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
    found = {
        (name(file), match)
        for file in below_the_command_line()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
        for match in flag.findall(node.value)
    }
    report(found, FLAGS_ELSEWHERE, "flags")


def test_no_file_is_too_long_to_read():
    found = {(name(file), "lines") for file in FILES if len(file.read_text(encoding="utf-8").splitlines()) > MAX_LINES}
    report(found, {(file, "lines"): why for file, why in LONGER.items()}, f"more than {MAX_LINES} lines")


@pytest.mark.parametrize(
    "arrow", [("ops/linear.py", "model"), ("model/moe.py", "data"), ("training/x.py", "cost"), ("runs/x.py", "paper")]
)
def test_a_wrong_arrow_is_seen(arrow):
    assert wrong_arrow(*arrow)


def test_a_right_arrow_is_not():
    assert not wrong_arrow("training/trainer.py", "model") and not wrong_arrow("cli/train.py", "paper")
