"""Write a run for somebody else: a zip file or folder with all they need, a repository on a hub, or a plain timm model.

    moe-bsr share runs/photos                                  # writes runs/photos.zip
    moe-bsr share runs/photos --out photos --with-backbone     # a folder, with the weights of the backbone
    moe-bsr share runs/photos --push me/photos --private
    moe-bsr share runs/photos_full --timm photos_timm --task pets

Writes the weights that training changed (for a linear probe some kilobytes), a description of the run, its report, and
a model card. The state of the optimizer, names of images, and paths and commands of this machine are left out.
moe_bsr.load and the commands predict, evaluate, compare and export accept the folder or the zip file in place of a run
folder.
Existing files are never replaced.

Exit status: 0 written, 2 invalid arguments or input.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from moe_bsr.cli import run_arguments
from moe_bsr.cli.main import program
from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder with one model for all its tasks")
    parser.add_argument("--out", type=Path, metavar="DIR|ZIP", help="folder or .zip file to write (default: RUN.zip)")
    help = "include the weights of the backbone; otherwise the user needs those that the run was trained from"
    parser.add_argument("--with-backbone", action="store_true", help=help)
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to this repository of the Hugging Face hub")
    help = "with --push: make the repository visible only to its owner"
    parser.add_argument("--private", action="store_true", help=help)
    help = (
        "instead, write a folder that timm.create_model('local-dir:DIR') loads; only for runs whose network timm has: "
        "without dropped tokens, experts and adapters"
    )
    parser.add_argument("--timm", type=Path, metavar="DIR", help=help)
    parser.add_argument("--task", metavar="NAME", help="with --timm: the task whose head is used")
    run_arguments.add_weights(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import ConfigError
    from moe_bsr.runs.share import push, share
    from moe_bsr.runs.timm_folder import write_timm

    if (arguments.private and not arguments.push) or (arguments.task and not arguments.timm):
        raise ConfigError("--private goes with --push, and --task with --timm")
    if arguments.timm is not None and (arguments.push or arguments.out or arguments.with_backbone):
        raise ConfigError("--timm writes a complete timm model to its DIR: leave out --out, --push and --with-backbone")
    if arguments.timm is not None:
        about = write_timm(arguments.run, arguments.timm, arguments.task, arguments.weights)
        result: dict[str, Any] = {"run": str(arguments.run), "out": str(arguments.timm), **about}
    else:
        result = {"run": str(arguments.run)}
        with tempfile.TemporaryDirectory(prefix="moe_bsr_") as place:
            wanted = arguments.out or (None if arguments.push else run_arguments.beside(arguments.run, ".zip"))
            sizes: dict[str, int] = {}
            if wanted is not None:
                sizes = share(arguments.run, wanted, arguments.with_backbone, arguments.weights)
                result["out"] = str(wanted)
            if arguments.push:
                folder = Path(place) / arguments.push.rpartition("/")[2]
                sizes = share(arguments.run, folder, arguments.with_backbone, arguments.weights)
                result["pushed"] = push(folder, arguments.push, arguments.private)
        result["files"] = sizes
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print_result(result)
    return 0


def print_result(result: dict[str, Any]) -> None:
    places = [result[key] for key in ("out", "pushed") if key in result]
    say(f"written: {', '.join(places)}")
    for name, size in result["files"].items():
        say(f"  {name:<20} {size / 1000:>10,.1f} kB")
    if "difference" in result:
        say(f"task {result['task']} as timm's {result['architecture']}; logits differ by {result['difference']:g}")
    elif "out" in result:
        say(f"next: {program('predict')} {result['out']} photo.jpg")
