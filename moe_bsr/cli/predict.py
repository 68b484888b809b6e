"""Name what is on images, for all tasks of a run at once.

    moe-bsr predict runs/quickstart photo.jpg
    moe-bsr predict runs/real *.jpg holiday/ --task pets --top 5 --json

IMAGE is an image file, or a folder: all images in it and below. The frozen blocks at the start of a model are
the same for every task: they run once per image, and each task continues from there, also when the run has one
model per task over the same frozen blocks. After moe-bsr reject RUN a star marks the task that an image belongs to,
or it is said that it belongs to none. With --json stdout holds one JSON object and nothing else. An image
that cannot be read is named on stderr and left out.

Exit status: 0 all images were read, 1 some were not, 2 refused.
"""

import argparse
import json
from typing import Any

from moe_bsr.cli import run_arguments
from moe_bsr.cli.main import FAILED, program
from moe_bsr.cli.terminal import say
from moe_bsr.runtime.names import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_run(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file, or a folder of them")
    run_arguments.add_tasks(parser)
    parser.add_argument("--top", type=run_arguments.at_least(1), default=3, metavar="N", help="names per task (3)")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of text")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.runs.load import load

    loaded = load(
        arguments.run,
        arguments.checkpoint,
        device=arguments.device,
        weights=arguments.weights,
        tasks=arguments.task,
    )
    with loaded.runtime.in_effect():
        report = loaded.predict(arguments.images, top=arguments.top)
    for skipped in report["skipped"]:
        say(f"{program('predict')}: {printable(skipped['reason'])}", error=True)
    if arguments.json:
        print(json.dumps(report, indent=1))
    elif report["images"]:
        print_report(report)
    return FAILED if report["skipped"] else 0


def print_report(report: dict[str, Any]) -> None:
    for image in report["images"]:
        nothing = "belongs_to" in image and image["belongs_to"] is None
        say(printable(image["image"]) + (": none of these tasks" if nothing else ""))
        width = max(map(len, image["tasks"]))
        for task, names in image["tasks"].items():
            found = ", ".join(f"{printable(n['name'])} {100 * n['probability']:.0f} %" for n in names)
            mark = "* " if image.get("belongs_to") == task else "  "
            say(f"{mark}{task.ljust(width)}  {found}")
    say()
    for group in report["groups"]:
        shared, blocks, tasks = group["shared_blocks"], group["blocks"], group["tasks"]
        if len(tasks) > 1:
            say(
                f"{len(tasks)} tasks: {shared} of {blocks} blocks ran once for all of them, "
                f"{blocks - shared} once for each task."
            )
