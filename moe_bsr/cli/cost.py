"""What a configuration costs before anyone trains it, and the measured truth beside it.

    moe-bsr cost configs/deit_tiny_moe_bsr.yaml                   # block by block, and in total
    moe-bsr cost configs/deit_tiny_moe_bsr.yaml storage=recompute --measure
    moe-bsr cost configs/vit_base_stl_bsr.yaml --budget 600MB     # does it fit, what would help
    moe-bsr cost configs/vit_base_stl_bsr.yaml --mode paper               # as the paper counts
    moe-bsr cost configs/vit_base_moe_bsr.yaml --processes 512 --machines 64 train.batch_size=65536
    moe-bsr cost configs/deit_tiny_moe_bsr.yaml --sweep --image-size 96 --batches 2 4

Modes: exact (what a training step of this code holds), paper and backrazor (the published rules). MB is 2^20
bytes, a multiply-add is two FLOPs. The micro-batch is train.batch_size / train.grad_accumulation_steps images.
Exit status: 0, 1 if the budget does not hold or a sweep is out of tolerance, 2 if refused.
"""

import argparse
import json
import sys
import textwrap
from typing import Any

import torch

from moe_bsr import config as configuration
from moe_bsr.benchmark import sweep
from moe_bsr.cli.run_arguments import at_least
from moe_bsr.config import Config, ConfigError, require
from moe_bsr.cost import planner as budget
from moe_bsr.cost import scaling
from moe_bsr.cost.predict import Cost, device_of, predict
from moe_bsr.data import load_spec
from moe_bsr.model.multitask import MultitaskViT, build_on_meta
from moe_bsr.paper import backrazor_rule as backrazor
from moe_bsr.paper import bsr_rule as paper
from moe_bsr.paper.shapes import from_model
from moe_bsr.runtime.device import Runtime, prepare
from moe_bsr.runtime.provenance import command, commit, environment

MB = 2**20
RULES = {"paper": paper.memory, "backrazor": backrazor.memory}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.batch_size=8")
    parser.add_argument("--mode", choices=["exact", "paper", "backrazor"], default="exact")
    parser.add_argument("--classes", type=int, help="of every task whose file does not say")
    parser.add_argument("--measure", action="store_true", help="run a step and show the difference")
    parser.add_argument("--budget", metavar="SIZE", help="such as 600MB: does it fit, and what would help")
    several = parser.add_argument_group("several processes: bytes exchanged, efficiency, what would send less")
    several.add_argument("--processes", type=at_least(1), metavar="W", help="in all; they share train.batch_size")
    several.add_argument("--machines", type=at_least(1), default=1, metavar="N", help="that these are on (1)")
    several.add_argument("--tflops", type=float, default=200.0, help="10^12 operations a second of one (200)")
    several.add_argument("--step-seconds", type=float, metavar="S", help="measured, of one's share of an update")
    parser.add_argument("--sweep", action="store_true", help="predicted against measured over everything")
    parser.add_argument("--backbones", nargs="+", help="of the sweep (default: the configuration's)")
    parser.add_argument("--image-size", type=int, help="of the sweep, in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 5], help="of the sweep")
    parser.add_argument("--storages", nargs="+", help="of the sweep (default: all)")
    parser.add_argument(
        "--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="of the sweep"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_intermixed_args(arguments)
    try:
        needs_exact = arguments.measure or arguments.budget is not None or arguments.sweep
        require(
            arguments.mode == "exact" or not needs_exact,
            "--mode",
            arguments.mode,
            "a published rule is no measure of this code; --measure, --budget and --sweep need exact",
        )
        require(min(arguments.batches) >= 1, "--batches", arguments.batches, "at least 1 image each")
        require(arguments.classes is None or arguments.classes >= 1, "--classes", arguments.classes, "at least 1")
        config = configuration.load(arguments.config, arguments.overrides)
        if arguments.processes is not None:
            require(
                arguments.processes % arguments.machines == 0,
                "--processes",
                arguments.processes,
                f"a multiple of the {arguments.machines} machines",
            )
            for flag, value in (("--tflops", arguments.tflops), ("--step-seconds", arguments.step_seconds)):
                require(value is None or 0 < value < float("inf"), flag, value, "a number above 0")
        result, lines, status = answer(config, classes_of(config, arguments.classes), arguments)
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(f"cost.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1) if arguments.json else "\n".join(lines))
    return status


def classes_of(config: Config, given: int | None) -> dict[str, int]:
    """Number of classes by task, as the task files say or as given; no data is opened.

    Raises:
        ConfigError: neither says.
    """
    classes = {}
    for name, file in config.task_files().items():
        classes[name] = load_spec(file).classes or given
        require(
            classes[name] is not None,
            "tasks",
            file,
            "its file does not say how many classes it has: give --classes N, or add `classes: N` to the file",
        )
    return classes


def answer(
    config: Config, classes: dict[str, int], arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[str], int]:
    """What was asked for: as JSON values, as lines, and the exit status."""
    notes = []
    if config.mode == "single_task":  # one model per task: tell the one with the largest head
        task = max(classes, key=classes.get)
        config, classes = config.of_task(task), {task: classes[task]}
        notes = [f"one model per task; this is the one of {task}"]
    if arguments.sweep:
        return sweep_answer(config, classes, arguments)
    batch = config.train.batch_size // config.train.grad_accumulation_steps
    model = build_on_meta(config, classes)
    if arguments.mode != "exact":
        result, lines, status = rule_answer(model, batch, arguments.mode)
        return result, [*notes, *lines], status
    runtime = prepare(config.runtime) if arguments.measure or not is_absent_gpu(config) else absent_gpu(config)
    cost = predict(model, config, batch=batch, precision=runtime.precision, all_tasks=True)
    result = {"mode": arguments.mode, "batch": batch, "precision": runtime.precision, **cost.as_dict()}
    lines = [
        *notes,
        f"micro-batch {batch}, {runtime.precision} ({runtime.precision_reason}), storage {config.storage}",
        *table(cost, batch),
    ]
    if config.data.feature_cache_mb:
        lines.append(
            f"data.feature_cache_mb: up to {config.data.feature_cache_mb} MB of kept stems (10^6 bytes) come on top"
        )
    status = 0
    if arguments.measure:
        cost, seen = sweep.run(config, classes, batch=batch)  # of one task's step: its own, smaller prediction
        result["measured"] = {
            "quantities": sweep.compare(cost, seen),
            "process_peak": seen.process_peak,
            "kept_by_block": sweep.compare_blocks(cost, seen),
            "at_peak": [[a.bytes, a.phase, a.section, a.maker] for a in seen.at_peak],
        }
        lines += ["", *measured_table(result["measured"], runtime.device.type)]
        if config.plan.moe_blocks:
            lines.append("predicted here with the largest expert's group as it was in this step: values decide it")
    if arguments.budget is not None:
        size = budget.parse_bytes(arguments.budget)
        told = budget.answer(config, classes, size, batch=batch, precision=runtime.precision)
        result["budget"] = told.as_dict()
        lines += ["", *budget_lines(told, batch)]
        status = 0 if told.fits else 1
    if arguments.processes is not None:
        told_ways = scaling.ways(
            config,
            classes,
            processes=arguments.processes,
            machines=arguments.machines,
            precision=runtime.precision,
            tflops=arguments.tflops,
            seconds=arguments.step_seconds,
        )
        result["several_processes"] = [way.as_dict() for way in told_ways]
        images = config.train.batch_size / arguments.processes
        lines += ["", *scaling.table(told_ways, arguments.processes, arguments.machines, images)]
    return result, lines, status


def is_absent_gpu(config: Config) -> bool:
    """Whether the run is for a GPU and there is none here: its cost can be predicted all the same."""
    return config.runtime.device.startswith("cuda") and not torch.cuda.is_available()


def absent_gpu(config: Config) -> Runtime:
    precision = "bf16" if config.runtime.precision == "auto" else config.runtime.precision
    return Runtime(device_of(config), precision, torch.get_num_threads(), "for a GPU that is not here")


def rule_answer(model: MultitaskViT, batch: int, mode: str) -> tuple[dict[str, Any], list[str], int]:
    """The cost by a published rule: float32, activations and 8-bit frozen weights, nothing else."""
    shape = from_model(model)
    estimate = RULES[mode](shape, batch)
    result = {
        "mode": mode,
        "batch": batch,
        "kept_per_image": estimate.kept,
        "peak_per_image": estimate.peak,
        "parameters": estimate.parameters,
        "total": estimate.total,
        "forward_flops": 2 * paper.forward_macs(shape),
    }
    lines = [f"{'kept by one image, MB':<22}"]
    lines += [f"  {name:<20}  {size / MB:>10.3f}" for name, size in estimate.kept.items()]
    lines += [
        f"{name:<22}  {size / MB:>10.3f}"
        for name, size in [
            ("peak of one image", estimate.peak),
            (f"x {batch} images", batch * estimate.peak),
            ("parameters", estimate.parameters),
            ("training memory", estimate.total),
        ]
    ]
    lines.append(f"{'GFLOPs forward':<22}  {result['forward_flops'] / 1e9:>10.3f}")
    return result, lines, 0


def sweep_answer(
    config: Config, classes: dict[str, int], arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[str], int]:
    records = []
    for record in sweep.sweep(
        config,
        classes,
        backbones=arguments.backbones or [config.backbone.name],
        image_size=arguments.image_size,
        batches=arguments.batches,
        storages=arguments.storages,
        precisions=arguments.precisions,
    ):
        records.append(record)
        about = " ".join(str(v) for k, v in record.items() if k != "quantities")
        print(
            f"{about}: kept {record['quantities']['kept']['difference']:+.3%}, "
            f"peak {record['quantities']['peak']['difference']:+.3%}",
            file=sys.stderr,
        )
    total = sweep.summary(records)
    held = all(total[name]["worst"] <= limit for name, limit in sweep.TOLERANCES.items())
    lines = [f"{len(records)} configurations     worst    median   allowed  worst at"]
    for name, about in total.items():
        limit = sweep.TOLERANCES.get(name)
        allowed, where = "" if limit is None else f"{limit:.0%}", " ".join(map(str, about["at"].values()))
        lines.append(f"{name:<22}  {about['worst']:>8.3%}  {about['median']:>8.3%}  {allowed:>8}  {where}")
    return (
        {
            "command": command(),
            "commit": commit(),
            "environment": environment(prepare(config.runtime)),
            "config": configuration.to_dict(config),
            "summary": total,
            "within_tolerance": held,
            "records": records,
        },
        lines,
        (0 if held else 1),
    )


def table(cost: Cost, batch: int) -> list[str]:
    """What each section keeps for the backward pass, and everything else a step holds."""
    lines = [f"{'kept for backward, MB':<22}  {'total':>10}  of which"]
    for section, kinds in cost.kept_by_block.items():
        parts = ", ".join(
            f"{kind} {size / MB:.3f}"
            for kind, size in sorted(kinds.items(), key=lambda item: -item[1])
            if size >= 0.0005 * MB
        )
        first, *more = textwrap.wrap(parts, 74) or [""]
        lines += [f"  {section:<20}  {sum(kinds.values()) / MB:>10.3f}  {first}", *(f"{'':<36}{line}" for line in more)]
    lines += ["", f"{'training step, MB':<22}"]
    average = [("weights' average", cost.average)] if cost.average else []
    lines += [
        f"  {name:<20}  {size / MB:>10.3f}"
        for name, size in [
            ("parameters", cost.parameters),
            ("gradients", cost.gradients),
            ("optimizer", cost.optimizer),
            *average,
            ("kept for backward", cost.kept),
            *((f"most in {k}", v) for k, v in cost.transients.items()),
            ("peak of everything", cost.peak),
        ]
    ]
    lines += ["", f"{'GFLOPs':<22}  {'micro-batch':>10}  per image"]
    lines += [
        f"  {name:<20}  {flops / 1e9:>11.2f}  {flops / batch / 1e9:>9.3f}"
        for name, flops in [("forward", cost.forward_flops), ("training step", cost.step_flops)]
    ]
    return lines


def measured_table(measured: dict[str, Any], device: str) -> list[str]:
    lines = [f"{'MB':<22}  {'predicted':>10}  {'measured':>10}  difference"]
    for name, row in measured["quantities"].items():
        lines.append(
            f"{name:<22}  {row['predicted'] / MB:>10.3f}  {row['measured'] / MB:>10.3f}  {row['difference']:>+10.3%}"
        )
    lines += [
        f"  kept by {name:<12}  {row['predicted'] / MB:>10.3f}  {row['measured'] / MB:>10.3f}"
        for name, row in measured["kept_by_block"].items()
    ]
    lines.append("(a step of one task; a block's input counts for the block that made it)")
    what = "CUDA's allocator" if device == "cuda" else "resident memory of the process, libraries included"
    lines += [
        f"{'peak in a step':<22}  {'':>10}  {measured['process_peak'] / MB:>10.1f}  {what}",
        "",
        "largest at the measured peak",
    ]
    return lines + [
        f"{size / MB:>10.3f}  {' '.join(filter(None, (phase, section))):<20}  {maker}"
        for size, phase, section, maker in measured["at_peak"]
    ]


def budget_lines(told: budget.BudgetReport, batch: int) -> list[str]:
    verdict = "fits" if told.fits else "does not fit"
    room = (
        f"at most {told.largest_batch} images fit"
        if told.largest_batch
        else f"not even one image fits, which takes {budget.digits(told.least)}"
    )
    lines = [
        f"budget {budget.digits(told.budget)}: a micro-batch of {batch} takes {budget.digits(told.peak)} and "
        f"{verdict}; {room}",
        f"{'single changes, the best first':<42}  saved MB  extra GFLOPs  fits  key=value",
    ]
    lines += [
        f"  {c.what:<40}  {c.bytes / MB:>8.3f}  {c.flops / 1e9:>+12.1f}  {'yes' if c.fits else '-':<4}  {c.overrides}"
        for c in told.changes
    ]
    return lines
