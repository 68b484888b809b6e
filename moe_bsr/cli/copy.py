"""Copy a packaged configuration or task file into the current folder, to change it.

    moe-bsr copy quickstart                      # quickstart.yaml here
    moe-bsr copy deit_tiny_moe_full configs      # into configs/, with the file it extends
    moe-bsr copy quickstart mine.yaml            # under another name
    moe-bsr copy pets tasks                      # a task; in tasks/ it is found by its name

`moe-bsr configs` and `moe-bsr tasks` list the names. The files that a configuration extends are copied beside it,
except base.yaml, whose values are the defaults anyway. Existing files are replaced only with --force.

Exit status: 0 copied, 2 no such name, a file exists, or DEST is a file that the copy extends (nothing is written).
"""

import argparse
import difflib
import re
from pathlib import Path

from moe_bsr.cli.main import program
from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of a configuration or a task")
    help = "folder or .yaml file to write (default: the current folder)"
    parser.add_argument("dest", nargs="?", type=Path, default=Path(), metavar="DEST", help=help)
    parser.add_argument("--force", action="store_true", help="replace existing files")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import ConfigError, packaged

    source = packaged.find("configs", arguments.name) or packaged.find("tasks", arguments.name)
    if source is None:
        known = [*packaged.names("configs"), *packaged.names("tasks")]
        near = difflib.get_close_matches(Path(arguments.name).stem, known, 1)
        raise ConfigError(
            f"no packaged configuration or task {arguments.name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "; moe-bsr configs and moe-bsr tasks list them")
        )
    is_file = arguments.dest.suffix in (".yaml", ".yml")
    target = arguments.dest if is_file else arguments.dest / source.name
    texts = with_what_it_extends(source, target)
    if not arguments.force and (there := [str(path) for path in texts if path.exists()]):
        raise ConfigError(f"{', '.join(there)}: there already; --force overwrites, or name another DEST")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        say(f"written: {path}")
    if source.parent.name == "configs":
        say(f"next: {program('train')} {target} --dry-run")
    elif target.parent.name != "tasks":
        say(f"use it as tasks=[{target}]; in a folder tasks/ it is found by its name")
    return 0


def with_what_it_extends(source: Path, target: Path) -> dict[Path, str]:
    """Return the text of each file to write: the target, and beside it the files that the source extends.

    Raises:
        ConfigError: two of them have the same place.
    """
    from moe_bsr.config import ConfigError

    text = source.read_text(encoding="utf-8")
    extended = re.search(r"^extends: *(\S+).*\n", text, re.MULTILINE)
    if extended is None:
        return {target: text}
    if extended[1] == "base.yaml":
        return {target: text.replace(extended[0], "")}
    beside = with_what_it_extends(source.parent / extended[1], target.parent / extended[1])
    if target in beside:
        raise ConfigError(
            f"{target}: {source.name} extends {target.name}, which is copied beside it; name another DEST"
        )
    return {target: text} | beside
