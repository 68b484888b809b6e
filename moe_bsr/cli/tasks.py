"""List the tasks there are: files of ./tasks, and those that come with the package.

    moe-bsr tasks
    moe-bsr tasks --json

A task is used by its name, tasks=[pets, food101], or by the path of its file. Where both folders have one of
the same name, the one of ./tasks is used. `moe-bsr copy pets` copies a packaged one, to change it.

Exit status: 0, or 1 if a task file cannot be used (it is named on stderr).
"""

import argparse
import json
from pathlib import Path

from moe_bsr.cli.main import FAILED
from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a list of objects")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import packaged
    from moe_bsr.data import load_spec

    here = {path.stem: path for path in sorted(Path("tasks").glob("*.yaml"))}
    files = here | {n: packaged.find("tasks", n) for n in packaged.names("tasks") if n not in here}
    found, failed = [], False
    for name, file in files.items():
        try:
            spec = load_spec(file)
        except ValueError as error:
            say(f"{file}: {error}", error=True)
            failed = True
            continue
        place = str(file) if name in here else "packaged"
        found.append(
            {
                "name": name,
                "title": spec.title,
                "classes": spec.classes,
                "source": spec.source,
                "license": spec.license,
                "file": place,
            }
        )
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        columns = ("name", "classes", "source", "file", "license")
        rows = [["task", *columns[1:]]]
        rows += [[str(task[column] or "-") for column in columns] for task in found]
        say(left_aligned(rows))
    return FAILED if failed else 0


def left_aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
