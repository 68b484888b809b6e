"""Arguments that several commands share, so that they are spelled and explained once."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN, and where its parts are now: --checkpoint, --weights, --device."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (best)")
    add_weights(parser)
    parser.add_argument("--device", help="where to compute: cpu, cuda, ... (the run's runtime.device)")


def add_weights(parser: argparse.ArgumentParser) -> None:
    help = "where the backbone's weights are (the run's backbone.weights)"
    parser.add_argument("--weights", metavar="FILE", help=help)


def add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", nargs="+", action="extend", metavar="NAME", help="only these (all)")


def add_data(parser: argparse.ArgumentParser) -> None:
    """--data-root and --batch-size."""
    parser.add_argument("--data-root", metavar="DIR", help="where data lie (the run's data.root)")
    parser.add_argument("--batch-size", type=at_least(1), default=64, metavar="N", help="images at once (64)")


CONFIG = "a YAML file, or a run folder; configs/NAME.yaml is also found in the package"


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """CONFIG and the key=value after it."""
    parser.add_argument("config", metavar="CONFIG", help=CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=200")


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: whole numbers from `least` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: at least {least}")
        return value

    number.__name__ = "whole number"  # argparse names the type by it
    return number


def read_result(file: Path, keys: set[str], kind: str) -> dict[str, Any]:
    """What an earlier call of this command wrote, for --show.

    Args:
        keys: that it has. kind: what such a file is called.
    Raises:
        ConfigError: it cannot be read, or is none.
    """
    from moe_bsr.config import ConfigError

    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}; --show takes a {kind} that this command wrote") from error
    if not isinstance(result, dict) or not keys <= result.keys():
        raise ConfigError(f"{file} is no {kind}: it lacks one of {', '.join(sorted(keys))}")
    return result
