"""Name what is on images, for all tasks of a run at once.

    python tools/predict.py RUN IMAGE ... [--task NAME ...] [--top N] [--json]
                            [--weights FILE] [--device cpu|cuda|...] [--checkpoint best|last|STEP]

The frozen blocks at the start of a model are the same for every task: they run once per image, and
each task continues from there, also when the run has one model per task over the same frozen blocks.
With --json stdout holds one JSON object and nothing else. An image that cannot be read is named on
stderr and left out.

    python tools/predict.py runs/quickstart photo.jpg
    python tools/predict.py runs/real *.jpg --task pets --top 5 --json

Exit status: 0 all images were read, 1 some were not, 2 refused.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image

from moe_bsr.data.sources import decode
from moe_bsr.runs.checkpoint import CheckpointError
from moe_bsr.runs.load import TrainedRun, load

BATCH = 32


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file")
    parser.add_argument("--task", nargs="+", action="extend", metavar="NAME", help="only these (all)")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="names per task (3)")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of text")
    parser.add_argument(
        "--weights", metavar="FILE", help="where the backbone's weights are (the run's backbone.weights)"
    )
    parser.add_argument("--device", help="where to compute: cpu, cuda, ... (the run's runtime.device)")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (best)")
    args = parser.parse_args(arguments)
    if args.top < 1:
        parser.error(f"--top {args.top}: at least 1")
    try:
        report = run_prediction(args)
    except (ValueError, OSError, CheckpointError, FloatingPointError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        sys.exit(2)
    if args.json:
        print(json.dumps(report, indent=1))
    elif report["images"]:
        print_report(report)
    if len(report["images"]) < len(args.images):
        sys.exit(1)


def run_prediction(args: argparse.Namespace) -> dict:
    loaded = load(args.run, args.checkpoint, device=args.device, weights=args.weights, tasks=args.task)
    tasks = list(loaded.models)
    paths, images = read_images(loaded, args.images)
    groups: dict[tuple, list[str]] = {}
    for task in tasks:
        groups.setdefault(loaded.models[task].features_key(), []).append(task)
    names = [{} for _ in images]
    for start in range(0, len(images), BATCH):
        for task, rows in predict(loaded, groups, torch.stack(images[start : start + BATCH])).items():
            for place, row in enumerate(rows, start):
                best = row.argsort(descending=True, stable=True)[: args.top].tolist()
                known = loaded.class_names[task]
                names[place][task] = [{"name": known[i], "probability": row[i].item()} for i in best]
    return {
        "run": str(args.run),
        "step": loaded.step,
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
            for path, found in zip(paths, names, strict=True)
        ],
    }


def read_images(loaded: TrainedRun, paths: list[str]) -> tuple[list[str], list[torch.Tensor]]:
    """The images that can be read, as the model takes them, and their paths; the others are named on stderr."""
    found, images = [], []
    for path in paths:
        try:
            image = decode(path, path)
        except ValueError as error:
            absent = isinstance(error.__cause__, FileNotFoundError)
            print(f"predict.py: {path}: no such file" if absent else f"predict.py: {error}", file=sys.stderr)
            continue
        found.append(path)
        images.append(loaded.transforms.eval_image(Image.fromarray(image)))
    return found, images


@torch.inference_mode()
def predict(loaded: TrainedRun, groups: dict[tuple, list[str]], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Probabilities (B, classes) by task of uint8 images (B, 3, S, S): one pass of each stem.

    Args:
        groups: the tasks that share a stem.
    """
    probabilities = {}
    with loaded.runtime.autocast():
        normalized = loaded.transforms.normalize(images, device=loaded.runtime.device)
        for tasks in groups.values():
            tokens, _ = loaded.models[tasks[0]].forward_features(normalized)
            for task in tasks:
                logits = loaded.models[task].forward_from(tokens, task).logits
                if not logits.isfinite().all():
                    raise FloatingPointError(
                        f"task {task}: logits that are not finite; the weights are broken, use an earlier checkpoint"
                    )
                probabilities[task] = logits.float().softmax(1).cpu()
    return probabilities


def print_report(report: dict) -> None:
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


if __name__ == "__main__":
    main()
