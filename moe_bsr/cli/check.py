"""Open and decode all images of tasks, and list those that cannot be read or look wrong.

    moe-bsr check pets --root data
    moe-bsr check tasks/birds.yaml tasks/cars.yaml --json

Every image that cannot be read is listed with the reason. Also listed are unused files, images of a single color,
images of less than 8 pixels on a side, and images with the same pixels as one of another split or class. All CPU cores
are used. Nothing is written.

Exit status: 0 all images can be read, 1 some cannot, 2 invalid arguments or task.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_bsr.cli.main import FAILED
from moe_bsr.cli.terminal import say

if TYPE_CHECKING:
    from moe_bsr.data import TaskData

EXAMPLES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", metavar="TASK", nargs="+", help="name of a task (see moe-bsr tasks), or a task file")
    help = "folder of the datasets (default: data)"
    parser.add_argument("--root", type=Path, default=Path("data"), metavar="DIR", help=help)
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects instead of text")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.data import load_spec, load_task

    tasks = [load_task(load_spec(task), root=arguments.root) for task in arguments.tasks]
    reports = []
    for report in decode_all(tasks):
        reports.append(report)
        if not arguments.json:
            say("\n".join(lines(report)))
    if arguments.json:
        print(json.dumps(reports, indent=1))
    return FAILED if any(report["broken"] for report in reports) else 0


def decode_all(tasks: Iterable["TaskData"]) -> Iterable[dict[str, Any]]:
    """Yield the report of `check_task` on each task, with a progress bar if stderr is a terminal."""
    from tqdm import tqdm

    from moe_bsr.data.check import check_task

    for data in tasks:
        count = len(data.train) + len(data.val) + len(data.test)
        with tqdm(total=count, desc=data.name, unit="img", leave=False, disable=not sys.stderr.isatty()) as bar:
            report = check_task(data, bar.update)
        yield report


def lines(report: dict[str, Any]) -> list[str]:
    """Format a report of `check_task` as text."""
    text = [f"{report['task']}: {report['classes']} classes ({report['origin']})"]
    text += [f"  {note}" for note in report["notes"]]
    for name, split in report["splits"].items():
        sides = " to ".join("{} x {}".format(*split[which]) for which in ("smallest", "largest") if which in split)
        text.append(f"  {name}: {split['images']} images" + (f", {sides} pixels" if sides else ""))
    text += [f"  {image['split']}: {image['reason']}" for image in report["broken"]]
    for key, what in (("constant", "of a single color"), ("tiny", "with less than 8 pixels on a side")):
        if images := report[key]:
            names = ", ".join(f"{image['split']}: {image['image']}" for image in images[:EXAMPLES])
            text.append(f"  {len(images)} {what}: {names}{', ...' if len(images) > EXAMPLES else ''}")
    for shared in report["shared"]:
        first, second = shared["splits"]
        pairs = ", ".join(" = ".join(pair) for pair in shared["examples"])
        text.append(f"  {shared['images']} images of {second} are in {first} as well: {pairs}")
    if report["two_labels"]["images"]:
        pairs = ", ".join(" = ".join(pair) for pair in report["two_labels"]["examples"])
        text.append(f"  {report['two_labels']['images']} images are in two classes: {pairs}")
    broken = len(report["broken"])
    return [*text, f"  {broken} cannot be read" if broken else "  all can be read"]
