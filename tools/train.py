"""Train several tasks as a configuration says, and write a run folder.

    python tools/train.py configs/quickstart.yaml
    python tools/train.py configs/deit_tiny_moe_bsr.yaml data.root=data train.steps=2000 --run runs/mine
    python tools/train.py configs/deit_tiny_moe_bsr.yaml --run runs/mine --resume
    python tools/train.py configs/quickstart.yaml --dry-run

Exit status: 0 finished, 1 training failed, 2 refused, 128 + signal if interrupted (saved; --resume goes on).
"""

if __name__ == "__main__":
    from moe_bsr.runtime import allocator

    allocator.start_again()  # before anything else is imported, or it would be imported twice

import argparse
import shlex
import sys
from pathlib import Path

from moe_bsr import config as configuration
from moe_bsr.api import train
from moe_bsr.config import ConfigError
from moe_bsr.data import UnreadableImage
from moe_bsr.model import summary as describe
from moe_bsr.model.multitask import build, build_on_meta
from moe_bsr.runs import folder as run
from moe_bsr.runs.checkpoint import CheckpointError
from moe_bsr.runtime.device import prepare
from moe_bsr.training.feature_cache import FeatureCache
from moe_bsr.training.trainer import NonFiniteLoss


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=200")
    parser.add_argument("--run", metavar="DIR", help="the run folder (default runs/<name of CONFIG>)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, exit")
    arguments = parser.parse_intermixed_args(arguments)
    folder = Path(arguments.run or Path("runs") / Path(arguments.config).stem)
    try:
        config = configuration.load(arguments.config, arguments.overrides)
        if arguments.dry_run:
            return dry_run(config, folder, arguments.resume)
        result = train(config, folder, arguments.resume)
    except (ConfigError, CheckpointError, NonFiniteLoss, FloatingPointError, OSError, ValueError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        # A full disk or a damaged image ends a training; what is not there is refused before there is one.
        failed = isinstance(error, (NonFiniteLoss, FloatingPointError, OSError, UnreadableImage))
        return 1 if failed and not arguments.dry_run and not isinstance(error, FileNotFoundError) else 2
    except KeyboardInterrupt:
        print("train.py: interrupted outside of training; a run that had begun goes on with --resume", file=sys.stderr)
        return 130
    print((folder / "report.md").read_text())
    if result["status"] == "interrupted":
        again = shlex.join([arguments.config, *arguments.overrides, "--run", str(folder), "--resume"])
        print(f"interrupted; saved in {folder}. Go on with: python tools/train.py {again}")
        return 128 + result["signal"]
    return 0


def dry_run(config: configuration.Config, folder: Path, resume: bool) -> int:
    """Open every dataset and the backbone, print the plan; write nothing."""
    runtime = prepare(config.runtime)
    build_on_meta(config, dict.fromkeys(config.task_names(), 2))
    tasks = {name: run.open_task(config, file) for name, file in config.task_files().items()}
    for name, data in tasks.items():
        for split in (data.train, data.val, data.test):
            split.source.image(int(split.index[0]))
        print(
            f"{name}: {len(data.class_names)} classes, train {len(data.train)}, val {len(data.val)}, "
            f"test {len(data.test)} ({data.origin})"
        )
    model = runtime.place(build(config, {name: len(data.class_names) for name, data in tasks.items()}))
    print("\n".join([*describe.summary(model, config), *describe.table(model, config)]))
    if config.data.feature_cache_mb:
        with runtime.autocast():
            print(
                FeatureCache(
                    model, {name: len(data.train) for name, data in tasks.items()}, config.data.feature_cache_mb
                )
            )
    run.check_folder(config, folder, resume)
    print(f"run folder {folder}; {runtime.precision} on {runtime.device} ({runtime.precision_reason})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
