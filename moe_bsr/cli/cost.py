"""Predict memory and FLOPs of a configuration before training, and measure them on request.

    moe-bsr cost configs/deit_tiny_moe_bsr.yaml                   # block by block, and in total
    moe-bsr cost configs/deit_tiny_moe_bsr.yaml storage=recompute --measure
    moe-bsr cost configs/vit_base_stl_bsr.yaml --budget 600MB     # does it fit, and which changes would help?
    moe-bsr cost configs/deit_small_moe_bsr.yaml --budget 1500MB --plans  # which plans of this backbone fit?
    moe-bsr cost --budget 900MB backbone.name=deit_tiny_patch16_224 tasks=[birds.yaml]
    moe-bsr cost configs/vit_base_stl_bsr.yaml --mode paper               # by the rule of the BSR paper
    moe-bsr cost configs/vit_base_moe_bsr.yaml --processes 512 --machines 64 train.batch_size=65536
    moe-bsr cost configs/deit_tiny_moe_bsr.yaml --sweep --image-size 96 --batches 2 4

Modes: exact (what a training step of this code holds), paper and backrazor (the published rules). MB is 2^20 bytes, and
a multiply-add counts as two FLOPs. The micro-batch is train.batch_size / train.grad_accumulation_steps images.

--budget SIZE compares SIZE with the tensors of a step. With --plans, or without CONFIG (which then is
configs/fit.yaml), SIZE is the memory of the whole process, and the plans that fit are listed, the fastest first. A plan
says which blocks train, where tokens are dropped, and which blocks have experts; each is in the fastest form that fits.
A plan is left out if another one is as good in seconds, memory, trained weights and patches. The seconds are
extrapolated from a few blocks that are timed on this machine.

Exit status: 0 done, 1 the budget does not suffice or a sweep is out of tolerance, 2 invalid arguments or input.
"""

import argparse
import json
import shlex
from typing import TYPE_CHECKING

from moe_bsr.cli.run_arguments import CONFIG, at_least
from moe_bsr.cli.terminal import say

if TYPE_CHECKING:
    from moe_bsr.config import Config

BASE = "configs/fit.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = f"{CONFIG}; key=value changes a value of it, such as train.batch_size=8"
    parser.add_argument("what", nargs="*", metavar="CONFIG|key=value", help=help)
    parser.add_argument("--mode", choices=["exact", "paper", "backrazor"], default="exact", help="(default: exact)")
    parser.add_argument(
        "--classes", type=int, metavar="N", help="classes of tasks whose file does not say (default: those of its data)"
    )
    parser.add_argument("--measure", action="store_true", help="run a step, and compare prediction and measurement")
    parser.add_argument("--budget", metavar="SIZE", help="such as 600MB: does it fit, and what would help?")
    parser.add_argument("--plans", action="store_true", help="with --budget: list the plans that fit")
    parser.add_argument("--no-measure", action="store_true", help="with --plans: compare FLOPs, and time nothing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    several = parser.add_argument_group("several processes: bytes exchanged, efficiency, ways to send less")
    help = "number in all; they share train.batch_size"
    several.add_argument("--processes", type=at_least(1), metavar="W", help=help)
    several.add_argument("--machines", type=at_least(1), default=1, metavar="N", help="number of machines (default: 1)")
    help = "speed of one process, in 10^12 operations per second (default: 200)"
    several.add_argument("--tflops", type=float, default=200.0, metavar="T", help=help)
    help = "measured time that one process computes in an update, instead of --tflops"
    several.add_argument("--step-seconds", type=float, metavar="S", help=help)
    sweep = parser.add_argument_group("sweep: predicted against measured, over many configurations")
    sweep.add_argument("--sweep", action="store_true", help="run it")
    sweep.add_argument("--backbones", nargs="+", metavar="NAME", help="(default: the configuration's)")
    sweep.add_argument("--image-size", type=int, metavar="PIXELS", help="(default: the backbone's)")
    sweep.add_argument("--batches", type=int, nargs="+", default=[2, 5], metavar="N", help="(default: 2 5)")
    sweep.add_argument("--storages", nargs="+", metavar="NAME", help="(default: all)")
    sweep.add_argument(
        "--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="(default: both)"
    )


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr import config as configuration
    from moe_bsr.config import ConfigError, require

    needs_exact = arguments.measure or arguments.budget is not None or arguments.sweep
    require(
        arguments.mode == "exact" or not needs_exact,
        "--mode",
        arguments.mode,
        "exact, for --measure, --budget and --sweep: the published rules do not describe this code",
    )
    require(min(arguments.batches) >= 1, "--batches", arguments.batches, "at least 1 image each")
    require(arguments.classes is None or arguments.classes >= 1, "--classes", arguments.classes, "at least 1")
    overrides = [item for item in arguments.what if "=" in item]
    named = [item for item in arguments.what if "=" not in item]
    if len(named) > 1:
        raise ConfigError(f"{' '.join(named)}: one configuration at a time")
    if arguments.budget is None and (arguments.plans or not named):
        raise ConfigError("name a configuration, or give --budget SIZE to list the plans that fit into it")
    file = named[0] if named else BASE
    config = configuration.load(file, overrides)
    if arguments.processes is not None:
        require(
            arguments.processes % arguments.machines == 0,
            "--processes",
            arguments.processes,
            f"a multiple of the {arguments.machines} machines",
        )
        for flag, value in (("--tflops", arguments.tflops), ("--step-seconds", arguments.step_seconds)):
            require(value is None or 0 < value < float("inf"), flag, value, "a number above 0")
    classes, notes = classes_of(config, arguments.classes), []
    if config.mode == "single_task":  # one model per task: take the one with the largest head
        task = max(classes, key=lambda name: classes[name])
        config, classes = config.of_task(task), {task: classes[task]}
        notes = [f"one model per task; this is the model of {task}"]
    if arguments.plans or not named:
        other = [f"--{key}" for key in ("measure", "sweep", "processes") if getattr(arguments, key)]
        require(not other, "--plans", " ".join(other), "none of these: it answers about many configurations")
        from moe_bsr.cli import cost_plans

        given = shlex.join([str(file), *overrides])
        result, lines, status = cost_plans.answer(config, classes, arguments.budget, given, not arguments.no_measure)
    else:
        from moe_bsr.cli import cost_answers

        result, lines, status = cost_answers.answer(config, classes, arguments)
    say(json.dumps(result, indent=1) if arguments.json else "\n".join([*notes, *lines]))
    return status


def classes_of(config: "Config", given: int | None) -> dict[str, int]:
    """Return the number of classes of each task: as its file says, else as given, else as its data has.

    Args:
        given: classes of a task whose file does not say; None to look at its data.
    Raises:
        ConfigError: a task's number is unknown.
    """
    from moe_bsr.config import require
    from moe_bsr.data import load_spec

    classes = {}
    for name, file in config.task_files().items():
        classes[name] = load_spec(file).classes or given or _counted(config, file)
        require(
            classes[name] is not None,
            "tasks",
            file,
            "its file does not say how many classes it has, and its data cannot be opened: give --classes N, or add "
            "`classes: N` to the file",
        )
    return classes


def _counted(config: "Config", file: str) -> int | None:
    """Return the number of classes in a task's data, or None if the data cannot be opened."""
    from moe_bsr.runs.folder import open_task

    try:
        return len(open_task(config, file).class_names)
    except (ValueError, OSError):
        return None
