"""Train several tasks as a configuration says, and write a run folder.

    moe-bsr train configs/quickstart.yaml
    moe-bsr train configs/deit_tiny_moe_bsr.yaml data.root=data train.steps=2000 --run runs/mine
    moe-bsr train runs/mine --resume                       # continue after an interruption
    moe-bsr train runs/mine --resume train.steps=3000      # train longer
    moe-bsr train configs/quickstart.yaml --dry-run --decode
    torchrun --nproc-per-node 2 -m moe_bsr train configs/quickstart.yaml train.grad_accumulation_steps=2

CONFIG is a YAML file. If there is no file of that path, the configuration of that name in the package is used (`moe-bsr
configs` lists them). It may also be a run folder: then the configuration is that of the run, and --run is by default
that folder.

Writes config.yaml (all values, also those chosen automatically), metrics.jsonl, checkpoint/, tensorboard/, report.json
and report.md to the run folder.

Exit status: 0 finished, 1 training failed, 2 invalid arguments or input (training did not start), 128 + signal if
interrupted by SIGINT, SIGTERM, SIGHUP, SIGXCPU, SIGUSR1 or SIGUSR2. An interrupted run is saved; continue it with
--resume.
"""

import argparse
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from moe_bsr.cli import run_arguments
from moe_bsr.cli.check import decode_all, lines
from moe_bsr.cli.main import FAILED, INTERRUPTED, in_flags, message_of, program
from moe_bsr.cli.terminal import say
from moe_bsr.runtime.names import printable

if TYPE_CHECKING:
    from moe_bsr.config import Config
    from moe_bsr.data import TaskData
    from moe_bsr.runtime.distributed import Alone


def add_arguments(parser: argparse.ArgumentParser, folder: str = "runs/NAME, or CONFIG if a run folder") -> None:
    """Add the arguments of `moe-bsr train`. `folder` is the default of --run, for the help text."""
    run_arguments.add_overrides(parser)
    parser.add_argument("--run", "--run-dir", metavar="DIR", type=Path, help=f"run folder (default: {folder})")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    add_dry_run(parser)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add --dry-run and --decode."""
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and write nothing")
    parser.add_argument("--decode", action="store_true", help="with --dry-run: read every image, as moe-bsr check does")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import load

    return train(arguments, load(arguments.config, arguments.overrides))


def train(arguments: argparse.Namespace, config: "Config", command: str = "train", ending: str = "") -> int:
    """Train as a configuration says, print the report, and return the exit status.

    Args:
        arguments: parsed arguments of `add_arguments`.
        command: name of the command, for messages.
        ending: appended to the name of the run folder if --run is not given.
    """
    import moe_bsr
    from moe_bsr.config import ConfigError
    from moe_bsr.data import UnreadableImage
    from moe_bsr.runs.report import markdown
    from moe_bsr.training.trainer import TrainingFailed

    given = Path(arguments.config)
    new = Path("runs") / f"{run_arguments.named(given).stem}{ending}"
    folder = arguments.run or (given if (given / "config.yaml").is_file() and not ending else new)
    if arguments.decode and not arguments.dry_run:
        raise ConfigError("--decode goes with --dry-run: it reads every image and trains nothing")
    if arguments.dry_run:
        return dry_run(config, folder, arguments.resume, arguments.decode)
    try:
        report = moe_bsr.train(config, folder, arguments.resume)
    except (TrainingFailed, FloatingPointError, UnreadableImage) as error:
        # Training had started: the model diverged, the disk is full, memory is short, or an image is damaged.
        say(f"{program(command)}: {printable(in_flags(message_of(error)))}", error=True)
        return FAILED
    except KeyboardInterrupt:
        say(
            f"{program(command)}: interrupted outside of training; continue a run that had started with --resume",
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
    """Open every dataset (if `decode`, every image) and the backbone, and print the plan. Write nothing.

    Of several processes only the first does this, after all have checked that they can train together.
    """
    from moe_bsr.runtime.device import find_device
    from moe_bsr.runtime.distributed import joined
    from moe_bsr.training.sharing import check_sharing

    with joined(find_device(config.runtime.device)) as ranks:
        check_sharing(config, ranks)
        return ranks.by_first(lambda: print_plan(config, folder, resume, decode, ranks))


def print_plan(config: "Config", folder: Path, resume: bool, decode: bool, ranks: "Alone") -> int:
    """Do the work of `dry_run` in one process, and return the exit status."""
    from moe_bsr.api import build_model, check
    from moe_bsr.model import summary
    from moe_bsr.runs.folder import check_folder, open_tasks
    from moe_bsr.runtime.device import prepare
    from moe_bsr.training.doubts import doubts
    from moe_bsr.training.feature_cache import FeatureCache

    runtime = prepare(config.runtime, ranks)
    check(config)  # raises for an impossible configuration before anything is downloaded
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
    model, notes = build_model(config, tasks, folder, resume)
    model = runtime.place(model)
    say("\n".join(notes))
    print("\n".join([*summary.summary(model, config), *summary.table(model, config)]))
    for doubt in doubts(config, {name: len(data.train) for name, data in tasks.items()}):
        print(f"warning: {doubt}")
    if config.data.feature_cache_mb:
        with runtime.autocast():
            sizes = {name: len(data.train) for name, data in tasks.items()}
            print(FeatureCache(model, sizes, config.data))
    check_folder(config, folder, resume)
    broken = count_broken(tasks.values()) if decode else 0
    say(f"run folder {folder}; {runtime.precision} on {runtime.device} ({runtime.precision_reason})")
    return FAILED if broken else 0


def count_broken(tasks: Iterable["TaskData"]) -> int:
    """Read every image and print a report; return how many cannot be read."""
    reports = []
    for report in decode_all(tasks):
        reports.append(report)
        say("\n".join(lines(report)))
    return sum(len(report["broken"]) for report in reports)
