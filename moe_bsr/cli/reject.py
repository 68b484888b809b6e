"""Teach a run to recognize images that belong to none of its tasks. `moe-bsr predict` then says so.

    moe-bsr reject runs/quickstart
    moe-bsr predict runs/quickstart holiday/

Each task answers for every image, so something else must say which task an image belongs to, if any. This command reads
training images (at most 5,000 per task) and the validation images once, and tries five scores: the largest probability,
the energy of the logits, the cosine with the class means, and the Mahalanobis distance to these, with features as they
are and normalized to length 1. It keeps the score that best separates the validation images of the tasks, with the
threshold that 95 % of a task's own validation images reach.

Writes RUN/rejection.safetensors, a small file that belongs to the weights of one checkpoint. Run the command again
after more training, or for another --checkpoint.

Columns of the table: AUROC, how often an image of the task scores higher than one of another task (50 % is chance);
"others rejected", images of other tasks that this task rejects; "own named", images of the task that predict assigns to
it; "as none", images of the task that all other tasks reject, as an estimate for tasks that the run does not have.

Exit status: 0 written, 2 invalid arguments or input.
"""

import argparse
import json

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_run(parser)
    run_arguments.add_data(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    import moe_bsr
    from moe_bsr.cli.evaluate import announce
    from moe_bsr.runtime.text_tables import as_text

    trained = run_arguments.loaded(arguments)
    with trained.runtime.in_effect():
        found = moe_bsr.reject(trained, batch_size=arguments.batch_size, on_task=announce)
    if arguments.json:
        print(json.dumps(found, indent=1, allow_nan=False))
        return 0
    say(f"{found['run']}, step {found['step']}: {100 * found['accepted']:.0f} % of a task's own images are accepted")
    if not found["mean_auroc"]:
        say(f"score: {found['score']}. It cannot be measured, because the run has only one task.")
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
