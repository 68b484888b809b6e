"""Give a run to somebody: a zip file or folder with all they need, a repository on a hub, or a plain timm model.

    moe-bsr share runs/photos                                  # runs/photos.zip
    moe-bsr share runs/photos --out photos --with-backbone     # a folder, with the backbone's own weights
    moe-bsr share runs/photos --push me/photos --private
    moe-bsr share runs/photos_full --timm photos_timm --task pets

What is written: the weights that training changed (of a linear probe some kilobytes), what the run is, its report and a
model card. Left out: the optimizer's state, names of images, paths and commands of this machine. moe_bsr.load,
moe-bsr predict and evaluate take the folder or the zip file as they take a run. Nothing is replaced.

Exit status: 0 written, 2 refused.
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
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, with one model for all its tasks")
    parser.add_argument("--out", type=Path, metavar="DIR|ZIP", help="where to (RUN.zip)")
    help = "the backbone's weights too; without them a user needs those the run was trained from"
    parser.add_argument("--with-backbone", action="store_true", help=help)
    parser.add_argument("--push", metavar="OWNER/NAME", help="to this repository of the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="with --push: a repository that only its owner sees")
    help = "a folder that timm.create_model('local-dir:DIR') loads; of a run without dropped tokens and experts"
    parser.add_argument("--timm", type=Path, metavar="DIR", help=help)
    parser.add_argument("--task", metavar="NAME", help="with --timm: of this task")
    run_arguments.add_weights(parser)
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of text")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import ConfigError
    from moe_bsr.runs.share import push, share
    from moe_bsr.runs.timm_folder import write_timm

    if (arguments.private and not arguments.push) or (arguments.task and not arguments.timm):
        raise ConfigError("--private goes with --push, and --task with --timm")
    if arguments.timm is not None and (arguments.push or arguments.out or arguments.with_backbone):
        raise ConfigError(
            "--timm writes a timm model, which holds everything: leave --out, --push, --with-backbone out"
        )
    if arguments.timm is not None:
        told = write_timm(arguments.run, arguments.timm, arguments.task, arguments.weights)
        result: dict[str, Any] = {"run": str(arguments.run), "out": str(arguments.timm), **told}
    else:
        result = {"run": str(arguments.run)}
        with tempfile.TemporaryDirectory(prefix="moe_bsr_") as place:
            wanted = arguments.out or (None if arguments.push else arguments.run.with_name(f"{arguments.run.name}.zip"))
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
        tell(result)
    return 0


def tell(result: dict[str, Any]) -> None:
    places = [result[key] for key in ("out", "pushed") if key in result]
    say(f"written: {', '.join(places)}")
    for name, size in result["files"].items():
        say(f"  {name:<20} {size / 1000:>10,.1f} kB")
    if "difference" in result:
        say(f"task {result['task']} as timm's {result['architecture']}; logits differ by {result['difference']:g}")
    elif "out" in result:
        say(f"next: {program('predict')} {result['out']} photo.jpg")
