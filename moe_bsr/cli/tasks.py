"""List the available tasks, or those of a run.

    moe-bsr tasks
    moe-bsr tasks runs/photos
    moe-bsr tasks --json

Without RUN: the task files in ./tasks and those of the package. Use a task by its name, tasks=[pets, food101], or by
the path of its file. If both folders have one of the same name, that of ./tasks is used. `moe-bsr copy pets` copies a
packaged one here, to change it.

With RUN, a run folder or the zip file of a shared run: when each task was added, the number of its images, a hash of
their names, sizes and labels, and its accuracy.

Exit status: 0 done, 1 a task file is invalid (it is named on stderr), 2 invalid run.
"""

import argparse
import json
from pathlib import Path

from moe_bsr.cli.main import FAILED
from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="list the tasks of this run")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")


def run(arguments: argparse.Namespace) -> int:
    return list_tasks(arguments) if arguments.run is None else list_tasks_of(arguments.run, arguments.json)


def list_tasks_of(run: Path, as_json: bool) -> int:
    from moe_bsr.runs.listing import tasks_of
    from moe_bsr.runtime.text_tables import as_text

    found = tasks_of(run)
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [["task", "classes", "train/val/test", "added", "data", "val %", "test %"]]
    for task in found:
        scores = ["-" if task[key] is None else f"{task[key]:.1f}" for key in ("val_top1", "test_top1")]
        images = "/".join(map(str, task["images"].values())) or "-"
        added = (task["added"] or "-")[:10]
        rows.append(
            [task["name"], str(task["classes"] or "-"), images, added, (task["data_sha256"] or "-")[:12], *scores]
        )
    say(as_text(rows, right=False))
    return 0


def list_tasks(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import packaged
    from moe_bsr.data import load_spec
    from moe_bsr.runtime.text_tables import as_text

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
        say(as_text(rows, right=False))
    return FAILED if failed else 0
