"""Arguments that several commands share."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_bsr.runs.load import TrainedRun


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add RUN, --checkpoint, --weights and --device."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--checkpoint", default="best", metavar="STEP", help="best, last or a step (default: best)")
    add_weights(parser)
    parser.add_argument("--device", help="cpu, cuda, ... (default: the run's runtime.device)")


def named(path: str | Path) -> Path:
    """Return the path with a name at its end: `.` and `..` are resolved, others stay as they are."""
    path = Path(path)
    return path.resolve() if path.name in ("", "..") else path


def beside(run: Path, ending: str) -> Path:
    """Return the default place of what is made of a run: beside it, with `ending` after its name without .zip."""
    run = named(run)
    return run.with_name(run.name.removesuffix(".zip") + ending)


def add_weights(parser: argparse.ArgumentParser) -> None:
    help = "weights of the backbone (default: the run's backbone.weights)"
    parser.add_argument("--weights", metavar="FILE", help=help)


def add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", nargs="+", action="extend", metavar="NAME", help="only these tasks (default: all)")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add --data-root, --skip-unreadable and --batch-size."""
    add_images(parser)
    parser.add_argument(
        "--batch-size", type=at_least(1), default=64, metavar="N", help="images per batch (default: 64)"
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add --data-root and --skip-unreadable."""
    parser.add_argument("--data-root", metavar="DIR", help="folder of the datasets (default: the run's data.root)")
    help = "leave out images that are missing or cannot be read (default: as the run's data.unreadable says)"
    parser.add_argument("--skip-unreadable", action="store_true", help=help)


def loaded(arguments: argparse.Namespace, device: str | None = None) -> "TrainedRun":
    """Load the run that the arguments of `add_run`, `add_images` and, if there are any, `add_tasks` mean.

    Args:
        device: in place of --device.
    """
    from moe_bsr.runs.load import load

    tasks = getattr(arguments, "task", None)
    places = arguments.data_root, device or arguments.device, arguments.weights
    return load(arguments.run, arguments.checkpoint, *places, tasks, arguments.skip_unreadable)


CONFIG = "configuration: a YAML file, or a run folder. configs/NAME.yaml is also looked up in the package"
OVERRIDES = "change a value of the configuration, such as train.steps=200"


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, and key=value for values that replace those of CONFIG."""
    parser.add_argument("config", metavar="CONFIG", help=CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def at_least(least: int) -> Callable[[str], int]:
    """Return an argument type that accepts whole numbers from `least` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: at least {least}")
        return value

    number.__name__ = "whole number"  # argparse shows it in errors
    return number


def read_result(file: Path, keys: set[str], kind: str) -> dict[str, Any]:
    """Read the JSON that an earlier call of this command wrote, for --show.

    Args:
        keys: keys that the file must have.
        kind: name of such files, for errors.
    Raises:
        ConfigError: the file cannot be read, or is of another kind.
    """
    from moe_bsr.config import ConfigError

    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}; --show takes a {kind} that this command wrote") from error
    if not isinstance(result, dict) or not keys <= result.keys():
        raise ConfigError(f"{file} is not a {kind}: it lacks one of {', '.join(sorted(keys))}")
    return result
