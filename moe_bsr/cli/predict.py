"""Name what is on images, for all tasks of a run at once.

    moe-bsr predict runs/quickstart photo.jpg
    moe-bsr predict runs/real *.jpg holiday/ --task pets --top 5 --json

IMAGE is an image file, or a folder: all images in it and below. The frozen blocks at the start of a model are
the same for every task: they run once per image, and each task continues from there, also when the run has one
model per task over the same frozen blocks. With --json stdout holds one JSON object and nothing else. An image
that cannot be read is named on stderr and left out.

Exit status: 0 all images were read, 1 some were not, 2 refused.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_bsr.cli import run_arguments
from moe_bsr.cli.main import FAILED, program

if TYPE_CHECKING:
    import torch

    from moe_bsr.runs.folder import TrainedRun

BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_run(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file, or a folder of them")
    run_arguments.add_tasks(parser)
    parser.add_argument("--top", type=run_arguments.at_least(1), default=3, metavar="N", help="names per task (3)")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of text")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.runs.folder import load

    loaded = load(
        arguments.run,
        arguments.checkpoint,
        device=arguments.device,
        weights=arguments.weights,
        tasks=arguments.task,
    )
    paths = image_files(arguments.images)
    report = {"run": str(arguments.run), "step": loaded.step, **name_images(loaded, paths, arguments.top)}
    if arguments.json:
        print(json.dumps(report, indent=1))
    elif report["images"]:
        print_report(report)
    return FAILED if len(report["images"]) < len(paths) else 0


def image_files(given: list[str]) -> list[str]:
    """The files given, and for each folder the images in it and below, in the order of their names.

    Raises:
        ValueError: a folder without any.
    """
    from moe_bsr.data.sources import EXTENSIONS

    found = []
    for path in given:
        if not Path(path).is_dir():
            found.append(path)
            continue
        inside = sorted(str(file) for file in Path(path).rglob("*") if file.suffix.lower() in EXTENSIONS)
        if not inside:
            raise ValueError(f"{path}: no images in this folder ({', '.join(sorted(EXTENSIONS))})")
        found += inside
    return found


def name_images(loaded: "TrainedRun", paths: list[str], top: int) -> dict[str, Any]:
    """The names by image and task, and which tasks shared a pass of the frozen blocks."""
    import torch

    tasks = list(loaded.models)
    read, images = read_images(loaded, paths)
    groups: dict[tuple, list[str]] = {}
    for task in tasks:
        groups.setdefault(loaded.models[task].features_key(), []).append(task)
    names = [{} for _ in images]
    for start in range(0, len(images), BATCH):
        for task, rows in probabilities(loaded, groups, torch.stack(images[start : start + BATCH])).items():
            for place, row in enumerate(rows, start):
                best = row.argsort(descending=True, stable=True)[:top].tolist()
                known = loaded.class_names[task]
                names[place][task] = [{"name": known[i], "probability": row[i].item()} for i in best]
    return {
        "stems": [
            {
                "tasks": members,
                "blocks": len(loaded.models[members[0]].plan),
                "shared_blocks": loaded.models[members[0]].path_start if len(members) > 1 else 0,
            }
            for members in groups.values()
        ],
        "images": [
            {"image": path, "tasks": {task: found[task] for task in tasks}}
            for path, found in zip(read, names, strict=True)
        ],
    }


def read_images(loaded: "TrainedRun", paths: list[str]) -> tuple[list[str], "list[torch.Tensor]"]:
    """The images that can be read, as the model takes them, and their paths; the others are named on stderr."""
    from PIL import Image

    from moe_bsr.data.sources import decode

    found, images = [], []
    for path in paths:
        try:
            image = decode(path, path)
        except ValueError as error:
            absent = isinstance(error.__cause__, FileNotFoundError)
            print(f"{program('predict')}: {path + ': no such file' if absent else error}", file=sys.stderr)
            continue
        found.append(path)
        images.append(loaded.transforms.eval_image(Image.fromarray(image)))
    return found, images


def probabilities(
    loaded: "TrainedRun", groups: dict[tuple, list[str]], images: "torch.Tensor"
) -> "dict[str, torch.Tensor]":
    """Probabilities (B, classes) by task of uint8 images (B, 3, S, S): one pass of the frozen blocks per group.

    Args:
        groups: the tasks that share their frozen blocks.
    """
    import torch

    result = {}
    with torch.inference_mode(), loaded.runtime.autocast():
        normalized = loaded.transforms.normalize(images, device=loaded.runtime.device)
        for tasks in groups.values():
            tokens, _ = loaded.models[tasks[0]].forward_features(normalized)
            for task in tasks:
                logits = loaded.models[task].forward_from(tokens, task).logits
                if not logits.isfinite().all():
                    raise FloatingPointError(
                        f"task {task}: logits that are not finite; the weights are broken, use an earlier checkpoint"
                    )
                result[task] = logits.float().softmax(1).cpu()
    return result


def print_report(report: dict[str, Any]) -> None:
    for image in report["images"]:
        print(image["image"])
        width = max(map(len, image["tasks"]))
        for task, names in image["tasks"].items():
            found = ", ".join(f"{n['name']} {100 * n['probability']:.0f} %" for n in names)
            print(f"  {task.ljust(width)}  {found}")
    print()
    for group in report["stems"]:
        shared, blocks, tasks = group["shared_blocks"], group["blocks"], group["tasks"]
        if len(tasks) > 1:
            print(
                f"{len(tasks)} tasks: {shared} of {blocks} blocks ran once for all of them, "
                f"{blocks - shared} once for each task."
            )
