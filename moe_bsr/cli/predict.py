"""Name what images show, for all tasks of a run at once.

    moe-bsr predict runs/quickstart photo.jpg
    moe-bsr predict runs/real *.jpg holiday/ --task pets --top 5 --json

RUN is the folder of a run, or what `moe-bsr share` made of a run. IMAGE is an image file, or a folder, which stands for
all images in it and below. The frozen blocks at the start of the network are the same for all tasks, so they run once
per image, and each task continues from there. This also holds for runs with one model per task.

After `moe-bsr reject RUN`, a star marks the task that an image belongs to, and an image of none of the tasks is
reported as such. With --json, stdout is one JSON object. An image that cannot be read is skipped, and named on stderr.

Exit status: 0 all images were read, 1 some were not, 2 invalid arguments or input.
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
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file, or folder of images")
    run_arguments.add_tasks(parser)
    help = "number of names per task (default: 3)"
    parser.add_argument("--top", type=run_arguments.at_least(1), default=3, metavar="N", help=help)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


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
