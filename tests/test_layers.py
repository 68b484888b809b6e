"""The layers of the architecture: imports go downwards only, and only some packages may print or use private names.

The tests parse the source with `ast` and import nothing from it. An import inside a function counts too.
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

# Top layer first. A package may import from lower layers, but not from other packages of its own layer.
LAYERS = [
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
LEVEL = {package: len(LAYERS) - depth for depth, packages in enumerate(LAYERS) for package in packages}

# Further limits: lower packages that a package must not import, and packages that only the listed ones may import.
NOT_IMPORTED = {"model": {"data"}, "ops": {"data"}, "export": {"training", "cost", "visualize", "callbacks"}}
IMPORTED_BY = {"paper": {"cli"}, "benchmark": {"cli"}}

# Where private names of torch and timm may be used: fast kernels, timm's ViT, and code that measures or traces torch.
PRIVATE_NAMES_ALLOWED = ("ops/", "model/backbones/vit.py", "benchmark/", "cost/")

# (file, name) -> why this exception is allowed.
PRIVATE_NAMES_ELSEWHERE = {
    ("data/sources/torchvision_datasets.py", "_labels"): "torchvision has no public name for its datasets' labels",
    (
        "model/layers.py",
        "_backward_hooks",
    ): "a layer with hooks must be called as a module; torch has no public test for hooks",
    ("model/layers.py", "_backward_pre_hooks"): "as above",
    ("model/layers.py", "_forward_hooks"): "as above",
    ("model/layers.py", "_forward_pre_hooks"): "as above",
    ("model/storage/by_kind.py", "_base"): "a view is packed once, together with its base tensor",
    ("model/storage/by_kind.py", "_version"): "a tensor that changed after it was saved must not be restored",
    ("runtime/cpu_features.py", "torch.ops"): "torch has no public test for these CPU features",
    ("runtime/cpu_features.py", "_is_mkldnn_bf16_supported"): "torch has no public test for these CPU features",
    ("runtime/device.py", "_fast_norm"): "timm's public switch for fast norms applies to the whole process",
    ("selftest/ranks.py", "_exit"): "os._exit is public; a forked child must not clean up what its parent still uses",
    ("selftest/kills.py", "_exit"): "os._exit is public; a forked child must not clean up what its parent still uses",
    (
        "selftest/sandbox.py",
        "_exit",
    ): "os._exit is public; a forked child must not clean up what its parent still uses",
    ("training/optim.py", "_foreach_lerp_"): "one call for all averaged parameters; torch has no public equivalent",
}
FLAGS_ELSEWHERE = {
    ("export/card.py", "--check"): "a flag of the program in the bundle",
    ("export/card.py", "--time"): "a flag of the program in the bundle",
    ("export/on_device.py", "--task"): "a flag of this program",
    ("export/on_device.py", "--check"): "a flag of this program",
    ("export/on_device.py", "--time"): "a flag of this program",
    ("benchmark/method_page.py", "--from-json"): "the generated page names the command that makes it",
    ("benchmark/method_page.py", "--markdown"): "the generated page names the command that makes it",
    ("benchmark/method_page.py", "--out"): "the generated page names the command that makes it",
    ("benchmark/method_page.py", "--train"): "the generated page names the command that makes it",
    ("paper/page.py", "--markdown"): "the generated page names the command that makes it",
    ("paper/page.py", "--mode"): "the generated page names the command that prints a figure",
}
# The program in an exported bundle runs alone on the device and has a command line of its own.
PROGRAMS = {("export/on_device.py", "argparse"): "see above", ("export/on_device.py", "print"): "see above"}
MAX_LINES = 350
LONGER: dict[str, str] = {}  # file -> why

# Imports that are to be removed soon. Should be empty.
MOVING: set[tuple[str, str]] = set()


def name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def package_of(file: Path) -> str:
    """Return the folder in `moe_bsr/` or, for a file directly in it, the file's name; "" for __init__ and __main__."""
    top = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if top in ("__init__", "__main__") else top


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (module, imported names) for every import statement, nested ones included."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield ("." * node.level) + (node.module or ""), [alias.name for alias in node.names]


def packages_imported(file: Path) -> set[str]:
    found = set()
    for module, names in imports(file):
        first, *rest = module.split(".")
        if first == "moe_bsr":
            found |= {rest[0]} if rest else set(names) & LEVEL.keys()
    return found - {package_of(file)}


def dependencies() -> set[tuple[str, str]]:
    """Return (file, package it imports from) for every import between packages."""
    return {(name(file), other) for file in FILES for other in packages_imported(file) if package_of(file)}


def is_forbidden(file: str, other: str) -> bool:
    here = file.split("/")[0].removesuffix(".py")
    if LEVEL[other] >= LEVEL[here] or other in NOT_IMPORTED.get(here, ()):
        return True
    return other in IMPORTED_BY and here not in IMPORTED_BY[other]


def report(found: set[tuple[str, str]], kept: dict, what: str) -> None:
    """Fail on new findings, and on listed exceptions that no longer occur, so that the list only shrinks."""
    new, gone = sorted(found - set(kept) - MOVING), sorted(set(kept) - found)
    assert not new, f"{what}: {new}"
    assert not gone, f"{what}: no longer found, remove from the list of exceptions: {gone}"


def test_every_package_has_a_layer():
    assert {package_of(file) for file in FILES} - {""} <= LEVEL.keys()
    banned = {"utils", "util", "common", "helpers", "misc"}
    assert not [name(file) for file in FILES if banned & {part.removesuffix(".py") for part in file.parts}]


def test_imports_are_absolute():
    assert not [name(file) for file in FILES for module, _ in imports(file) if module.startswith(".")]


def test_imports_go_downwards_only():
    report({each for each in dependencies() if is_forbidden(*each)}, {}, "forbidden imports")


def test_only_the_command_line_imports_the_public_api():
    """The names in `moe_bsr/__init__.py` are above every layer."""
    found = [
        (name(file), module, names)
        for file in FILES
        if package_of(file) not in ("", "cli")
        for module, names in imports(file)
        if module == "moe_bsr" and not set(names or ["moe_bsr"]) <= LEVEL.keys()
    ]
    assert not found


def test_tests_mirror_the_packages():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    assert folders <= LEVEL.keys() | {"gpu"}  # all tests that need a GPU are in one folder


def test_no_file_imports_private_names_of_another():
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
    """Return every name with a leading underscore that moe_bsr itself defines."""
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
    """Yield private names of third-party code: imported, used as an attribute, or named in getattr and the like."""
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


def test_private_names_of_other_libraries_are_used_in_few_places():
    found = {
        (name(file), word)
        for file in FILES
        if not name(file).startswith(PRIVATE_NAMES_ALLOWED)
        for word in foreign_private_names(file)
    }
    report(found, PRIVATE_NAMES_ELSEWHERE, "private names of other libraries")


def below_the_command_line() -> list[Path]:
    return [file for file in FILES if package_of(file) not in ("", "cli")]


def test_nothing_below_the_command_line_prints_or_parses_arguments():
    found = set()
    for file in below_the_command_line():
        if {"argparse"} & {module.split(".")[0] for module, _ in imports(file)}:
            found.add((name(file), "argparse"))
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Name) and node.id == "print":
                found.add((name(file), "print"))
            if isinstance(node, ast.Attribute) and node.attr == "argv":
                found.add((name(file), "sys.argv"))
    report(found, PROGRAMS, "only cli parses arguments and prints")


def test_nothing_below_the_command_line_names_flags():
    """Messages below cli name the argument or the key, and cli adds the flag.

    Strings without a space are skipped: they are arguments of another program (git).
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


def test_no_file_is_too_long():
    found = {(name(file), "lines") for file in FILES if len(file.read_text(encoding="utf-8").splitlines()) > MAX_LINES}
    report(found, {(file, "lines"): why for file, why in LONGER.items()}, f"more than {MAX_LINES} lines")


@pytest.mark.parametrize(
    "dependency",
    [("ops/linear.py", "model"), ("model/moe.py", "data"), ("training/x.py", "cost"), ("runs/x.py", "paper")],
)
def test_a_forbidden_import_is_reported(dependency):
    assert is_forbidden(*dependency)


def test_an_allowed_import_is_not_reported():
    assert not is_forbidden("training/trainer.py", "model") and not is_forbidden("cli/train.py", "paper")
