"""Let a run learn what belongs to none of its tasks. moe-bsr predict says it from then on.

    moe-bsr reject runs/quickstart
    moe-bsr predict runs/quickstart holiday/

Every task answers every image. So that predict can say which task an image belongs to, and whether to any, this looks
once at training images (5,000 of a task at most) and at the validation images, and tries five scores: the largest
probability, the energy of the logits, the cosine with the means of the classes, and the Mahalanobis distance to these,
with features as they are and at length 1. The one that tells the tasks' validation images apart best is kept, with the
threshold that 95 % of a task's own validation images reach. It is small, lies in RUN/rejection.safetensors and is of
the weights it was made with: after more training, or for another --checkpoint, run it again.

AUROC: how often an own image scores higher than another task's (50 % is chance). "others rejected": of other tasks'
images. "own named": own images that predict gives to this task. "as none": own images that all other tasks reject, what
a task that the run does not know would get.
"""

import argparse
import json

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_run(parser)
    run_arguments.add_data(parser)
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    import moe_bsr
    from moe_bsr.cli.evaluate import announce
    from moe_bsr.runtime.text_tables import as_text

    trained = moe_bsr.load(
        arguments.run, arguments.checkpoint, arguments.data_root, arguments.device, arguments.weights
    )
    with trained.runtime.in_effect():
        found = moe_bsr.reject(trained, batch_size=arguments.batch_size, on_task=announce)
    if arguments.json:
        print(json.dumps(found, indent=1, allow_nan=False))
        return 0
    say(f"{found['run']}, step {found['step']}: {100 * found['accepted']:.0f} % of a task's own images are accepted")
    if not found["mean_auroc"]:
        say(f"score: {found['score']}. With one task there are no other images to measure it by.")
        return 0
    every = ", ".join(f"{name} {100 * value:.1f}" for name, value in found["mean_auroc"].items())
    say(f"score: {found['score']} (mean AUROC in %: {every})")
    say()
    rows = [["%", "AUROC", "others rejected", "own named", "as none", "images"]]
    for task, about in found["tasks"].items():
        shares = [f"{100 * about[key]:.1f}" for key in ("auroc", "rejected", "named", "foreign")]
        rows.append([task, *shares, f"{about['train_images']} + {about['val_images']}"])
    say(as_text(rows))
    return 0
