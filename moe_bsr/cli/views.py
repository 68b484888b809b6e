"""Draw what a trained run does with experts and patches, and open TensorBoard on it.

    moe-bsr views runs/quickstart
    moe-bsr views runs/real --no-serve --images 8 --ablation-images 0

RUN is a folder that `moe-bsr train` wrote. The checkpoint is run on the validation split; the pictures go
into RUN/views/ (PNG files, and index.html that says what they come to, shows and explains all of them and needs
no server). Of more than 12 tasks the worst and the best are drawn; --task names
others. Then TensorBoard starts on what training wrote, until Ctrl-C; with --no-serve it does not. Drawing again
replaces what was drawn before.
"""

import argparse
import contextlib
import shlex
import subprocess
import sys

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say

SAMPLES = "images=100,text=100"  # steps kept of each picture; TensorBoard's own 10 would hide a run's history


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_run(parser)
    run_arguments.add_tasks(parser)
    run_arguments.add_data(parser)
    at_least = run_arguments.at_least
    parser.add_argument("--no-serve", action="store_true", help="only write; start no TensorBoard")
    parser.add_argument("--images", type=at_least(1), default=4, metavar="N", help="strips per task (4)")
    parser.add_argument(
        "--ablation-images",
        "--ablate",
        type=at_least(0),
        default=256,
        metavar="N",
        help="images per task for masking experts; 0 leaves it out (256)",
    )
    parser.add_argument("--port", default="default", help="TensorBoard's (6006 or the next free one)")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.model.backbones import require_tokens
    from moe_bsr.runs.load import load
    from moe_bsr.visualize import expert_report

    loaded = load(
        arguments.run, arguments.checkpoint, arguments.data_root, arguments.device, arguments.weights, arguments.task
    )
    require_tokens(loaded.config.backbone, "views")
    with loaded.runtime.in_effect():
        sections = expert_report.sections(
            loaded,
            arguments.images,
            arguments.ablation_images,
            arguments.batch_size,
            say=lambda line: say(line, error=True),
        )
    say(expert_report.write(loaded, sections))
    options = ["--logdir", str(arguments.run), "--samples_per_plugin", SAMPLES, "--reload_multifile", "true"]
    if arguments.no_serve:
        say(f"in TensorBoard: tensorboard {shlex.join(options)}")
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        return subprocess.call([sys.executable, "-m", "tensorboard.main", *options, "--port", arguments.port])
    return 0
