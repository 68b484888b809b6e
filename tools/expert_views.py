"""Draw what a trained run does with experts and patches, and open TensorBoard on it.

    python tools/expert_views.py RUN [--no-serve] [--images N] [--ablate N] [--batch-size N]
                                 [--data-root DIR] [--weights FILE] [--device cpu|cuda|...]
                                 [--checkpoint best|last|STEP] [--port N]

RUN is a run folder of tools/train.py. The checkpoint is run on the validation split; the pictures go
into RUN/views/ (PNG files, and index.html that shows and explains all of them and needs no server) and
into RUN/tensorboard. Then TensorBoard starts, until Ctrl-C; with --no-serve it does not. Drawing again
replaces what was drawn before.

    python tools/expert_views.py runs/quickstart
    python tools/expert_views.py runs/real --no-serve --images 8 --ablate 0
"""

if __name__ == "__main__":
    from moe_bsr.runtime import allocator

    allocator.start_again()  # before anything else is imported, or it would be imported twice

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

from moe_bsr.runs.checkpoint import CheckpointError
from moe_bsr.runs.load import load
from moe_bsr.visualize import expert_report as gallery

SAMPLES = "images=100,text=100"  # steps kept of each picture; TensorBoard's own 10 would hide a run's history


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--no-serve", action="store_true", help="only write; start no TensorBoard")
    parser.add_argument("--images", type=int, default=4, metavar="N", help="strips per task (4)")
    parser.add_argument(
        "--ablate",
        type=int,
        default=256,
        metavar="N",
        help="images per task for masking experts; 0 leaves it out (256)",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once (64)")
    parser.add_argument("--data-root", metavar="DIR", help="where data lie (the run's data.root)")
    parser.add_argument(
        "--weights", metavar="FILE", help="where the backbone's weights are (the run's backbone.weights)"
    )
    parser.add_argument("--device", help="where to compute: cpu, cuda, ... (the run's runtime.device)")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (best)")
    parser.add_argument("--port", default="default", help="TensorBoard's (6006 or the next free one)")
    args = parser.parse_args(arguments)
    for name, least in (("images", 1), ("ablate", 0), ("batch_size", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
    try:
        loaded = load(args.run, args.checkpoint, args.data_root, args.device, args.weights)
        sections = gallery.sections(
            loaded, args.images, args.ablate, args.batch_size, say=lambda line: print(line, file=sys.stderr)
        )
        written = gallery.write(loaded, sections)
    except (ValueError, OSError, CheckpointError, FloatingPointError) as error:
        print(f"expert_views.py: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(map(str, written)))
    options = ["--logdir", str(args.run), "--samples_per_plugin", SAMPLES, "--reload_multifile", "true"]
    if args.no_serve:
        print("in TensorBoard:", "tensorboard", *options)
        return
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(subprocess.call([sys.executable, "-m", "tensorboard.main", *options, "--port", args.port]))


if __name__ == "__main__":
    main()
