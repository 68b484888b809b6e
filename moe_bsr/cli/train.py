"""Train several tasks as a configuration says, and write a run folder.

    moe-bsr train configs/quickstart.yaml
    moe-bsr train configs/deit_tiny_moe_bsr.yaml data.root=data train.steps=2000 --run runs/mine
    moe-bsr train runs/mine --resume
    moe-bsr train runs/mine --resume train.steps=3000
    moe-bsr train configs/quickstart.yaml --dry-run --decode
    torchrun --nproc-per-node 2 -m moe_bsr train configs/quickstart.yaml train.grad_accumulation_steps=2

CONFIG is the file of that path, or else the one of that name in the package (moe-bsr configs lists them); or a run
folder, for the configuration of that run. --run is then by default that folder.

Exit status: 0 finished, 1 training failed, 2 refused before it began, 128 + signal if interrupted (saved; --resume
goes on). SIGINT, SIGTERM, SIGHUP, SIGXCPU, SIGUSR1 and SIGUSR2 interrupt.
"""

import argparse
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from moe_bsr.cli import run_arguments
from moe_bsr.cli.check import decode_all, lines
from moe_bsr.cli.main import FAILED, INTERRUPTED, in_flags, program, told
from moe_bsr.cli.terminal import say
from moe_bsr.runtime.names import printable

if TYPE_CHECKING:
    from moe_bsr.config import Config
    from moe_bsr.data import TaskData


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_overrides(parser)
    parser.add_argument(
        "--run", "--run-dir", metavar="DIR", type=Path, help="the run folder (CONFIG, or runs/<its name>)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, exit")
    parser.add_argument("--decode", action="store_true", help="with --dry-run: read every image, as moe-bsr check does")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import load, packaged

    return train(arguments, load(packaged.find_config(arguments.config), arguments.overrides))


def train(arguments: argparse.Namespace, config: "Config", command: str = "train", ending: str = "") -> int:
    """Train as a configuration says, and tell about it.

    Args:
        arguments: of `add_arguments`. command: as it is called.
        ending: of the name of the run folder, where none was given.
    """
    import moe_bsr
    from moe_bsr.config import ConfigError
    from moe_bsr.data import UnreadableImage
    from moe_bsr.runs.report import markdown
    from moe_bsr.training.trainer import TrainingFailed

    named = Path(arguments.config)
    is_run = (named / "config.yaml").is_file()
    folder = arguments.run or (named if is_run and not ending else Path("runs") / f"{named.stem}{ending}")
    if arguments.decode and not arguments.dry_run:
        raise ConfigError("--decode goes with --dry-run: it reads every image and trains nothing")
    if arguments.dry_run:
        return dry_run(config, folder, arguments.resume, arguments.decode)
    try:
        report = moe_bsr.train(config, folder, arguments.resume)
    except (TrainingFailed, FloatingPointError, UnreadableImage) as error:
        # A diverged model, a full disk, too little memory or a damaged image ends a training that had begun.
        say(f"{program(command)}: {printable(in_flags(told(error)))}", error=True)
        return FAILED
    except KeyboardInterrupt:
        say(
            f"{program(command)}: interrupted outside of training; a run that had begun goes on with --resume",
            error=True,
        )
        return INTERRUPTED
    say(markdown(report, whole=False))
    if report["status"] == "interrupted":
        again = shlex.join([str(folder), "--resume"])
        say(f"interrupted; saved in {folder}. Go on with: {program('train')} {again}")
        return 128 + report["signal"]
    return 0


def dry_run(config: "Config", folder: Path, resume: bool, decode: bool) -> int:
    """Open every dataset (with `decode` every image) and the backbone, print the plan; write nothing."""
    from moe_bsr.api import build_model, check
    from moe_bsr.model import summary
    from moe_bsr.runs.folder import check_folder, open_tasks
    from moe_bsr.runtime.device import prepare
    from moe_bsr.training.doubts import doubts
    from moe_bsr.training.feature_cache import FeatureCache

    runtime = prepare(config.runtime)
    check(config)  # what cannot be is refused before any download
    tasks, notes = open_tasks(config, folder, resume)
    for name, data in tasks.items():
        for split in (data.train, data.val, data.test):
            if not decode and config.data.unreadable == "stop":
                split.source.image(split.place(0))
        say(
            f"{name}: {len(data.class_names)} classes, train {len(data.train)}, val {len(data.val)}, "
            f"test {len(data.test)} ({data.origin})"
        )
    print(*notes, sep="\n", end="\n" if notes else "")
    model, told = build_model(config, tasks, folder, resume)
    model = runtime.place(model)
    say("\n".join(told))
    print("\n".join([*summary.summary(model, config), *summary.table(model, config)]))
    for doubt in doubts(config, {name: len(data.train) for name, data in tasks.items()}):
        print(f"warning: {doubt}")
    if config.data.feature_cache_mb:
        with runtime.autocast():
            sizes = {name: len(data.train) for name, data in tasks.items()}
            print(FeatureCache(model, sizes, config.data))
    check_folder(config, folder, resume)
    broken = decoded(tasks.values()) if decode else 0
    say(f"run folder {folder}; {runtime.precision} on {runtime.device} ({runtime.precision_reason})")
    return FAILED if broken else 0


def decoded(tasks: Iterable["TaskData"]) -> int:
    """Read every image and tell about them; returns how many cannot be read."""
    reports = []
    for report in decode_all(tasks):
        reports.append(report)
        say("\n".join(lines(report)))
    return sum(len(report["broken"]) for report in reports)
