"""Draw how a trained run uses experts and patches, and open TensorBoard on it.

    moe-bsr views runs/quickstart
    moe-bsr views runs/real --no-serve --images 8 --ablation-images 0

Runs the checkpoint on the validation split. Writes PNG files and index.html to RUN/views/, replacing earlier ones. The
page needs no server; it begins with conclusions in words, and explains each picture. For more than 12 tasks it shows
the worst and the best; --task names others. Then TensorBoard starts on what training wrote, until Ctrl-C, unless
--no-serve is given. Needs the extra `views`.

Exit status: 0 done, 2 invalid arguments or input; otherwise that of TensorBoard.
"""

import argparse
import contextlib
import shlex
import subprocess
import sys

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say

SAMPLES = "images=100,text=100"  # steps shown of each picture; TensorBoard's default of 10 would hide most of a run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_run(parser)
    run_arguments.add_tasks(parser)
    run_arguments.add_data(parser)
    at_least = run_arguments.at_least
    parser.add_argument("--no-serve", action="store_true", help="write the files only, and do not start TensorBoard")
    help = "images per task whose patches are drawn (default: 4)"
    parser.add_argument("--images", type=at_least(1), default=4, metavar="N", help=help)
    help = "images per task for masking experts; 0 leaves this out (default: 256)"
    parser.add_argument("--ablation-images", type=at_least(0), default=256, metavar="N", help=help)
    parser.add_argument("--port", default="default", help="port of TensorBoard (default: 6006 or the next free one)")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.model.backbones import require_tokens
    from moe_bsr.runs import archive
    from moe_bsr.visualize import expert_report

    archive.require_folder(arguments.run, "pictures are written into the folder of the run")
    loaded = run_arguments.loaded(arguments)
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
