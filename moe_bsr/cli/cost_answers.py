"""Answer `moe-bsr cost` about one configuration: as values for JSON, as lines of text, and with an exit status."""

import argparse
import sys
import textwrap
from dataclasses import asdict
from typing import Any

from moe_bsr import config as configuration
from moe_bsr.benchmark import cost_check
from moe_bsr.config import Config
from moe_bsr.cost import planner as budget
from moe_bsr.cost import scaling
from moe_bsr.cost.absent_gpu import absent_gpu, is_absent_gpu
from moe_bsr.cost.predict import Cost, predict
from moe_bsr.model.backbones import require_tokens
from moe_bsr.model.multitask import MultitaskViT, build_on_meta
from moe_bsr.paper import backrazor_rule as backrazor
from moe_bsr.paper import bsr_rule as paper
from moe_bsr.paper.shapes import from_model
from moe_bsr.runtime.device import prepare
from moe_bsr.runtime.provenance import made_by
from moe_bsr.training.sharing import check_shared_optimizer

MB = 2**20
RULES = {"paper": paper.memory, "backrazor": backrazor.memory}


def answer(
    config: Config, classes: dict[str, int], arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[str], int]:
    """Answer what the arguments ask.

    Args:
        classes: number of classes by task.
    Returns:
        JSON values, lines of text, and the exit status.
    """
    if (arguments.processes or 1) > 1:
        check_shared_optimizer(config.train)
    if arguments.sweep:
        return sweep_answer(config, classes, arguments)
    batch = config.train.batch_size // config.train.grad_accumulation_steps
    model = build_on_meta(config, classes)
    if arguments.mode != "exact":
        return rule_answer(config, model, batch, arguments.mode)
    runtime = prepare(config.runtime) if arguments.measure or not is_absent_gpu(config) else absent_gpu(config)
    cost = predict(model, config, batch=batch, precision=runtime.precision, all_tasks=True)
    result = {"mode": arguments.mode, "batch": batch, "precision": runtime.precision, **asdict(cost)}
    lines = [
        f"micro-batch {batch}, {runtime.precision} ({runtime.precision_reason}), storage {config.storage}",
        *table(cost, batch),
    ]
    if config.data.feature_cache_mb:
        lines.append(
            f"data.feature_cache_mb: up to {config.data.feature_cache_mb} MB (10^6 bytes) of cached features are extra"
        )
    status = 0
    if arguments.measure:
        cost, seen = cost_check.run(config, classes, batch=batch)  # a step of one task, with its smaller prediction
        result["measured"] = {
            "quantities": cost_check.compare(cost, seen),
            "process_peak": seen.process_peak,
            "kept_by_block": cost_check.compare_blocks(cost, seen),
            "at_peak": [[a.bytes, a.phase, a.section, a.maker] for a in seen.at_peak],
        }
        lines += ["", *measured_table(result["measured"], runtime.device.type)]
        if config.plan.moe_blocks:
            lines.append("the prediction takes the largest group of an expert from this step: it depends on the data")
    if arguments.budget is not None:
        size = budget.parse_bytes(arguments.budget)
        report = budget.answer(config, classes, size, batch=batch, precision=runtime.precision)
        result["budget"] = asdict(report)
        lines += ["", *budget_lines(report, batch)]
        status = 0 if report.fits else 1
    if arguments.processes is not None:
        ways = scaling.ways(
            config,
            classes,
            processes=arguments.processes,
            machines=arguments.machines,
            precision=runtime.precision,
            tflops=arguments.tflops,
            seconds=arguments.step_seconds,
        )
        result["several_processes"] = [asdict(way) for way in ways]
        images = config.train.batch_size / arguments.processes
        lines += ["", *scaling.table(ways, arguments.processes, arguments.machines, images)]
    return result, lines, status


def rule_answer(config: Config, model: MultitaskViT, batch: int, mode: str) -> tuple[dict[str, Any], list[str], int]:
    """Answer by a published rule: activations in float32, parameters with the frozen ones in 8 bits, nothing else."""
    require_tokens(config.backbone, f"--mode {mode}")
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
    require_tokens(config.backbone, "--sweep")
    records = []
    for record in cost_check.sweep(
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
    total = cost_check.summary(records)
    held = all(total[name]["worst"] <= limit for name, limit in cost_check.TOLERANCES.items())
    lines = [f"{len(records)} configurations     worst    median   allowed  worst at"]
    for name, about in total.items():
        limit = cost_check.TOLERANCES.get(name)
        allowed, where = "" if limit is None else f"{limit:.0%}", " ".join(map(str, about["at"].values()))
        lines.append(f"{name:<22}  {about['worst']:>8.3%}  {about['median']:>8.3%}  {allowed:>8}  {where}")
    return (
        {
            **made_by(prepare(config.runtime)),
            "config": configuration.to_dict(config),
            "summary": total,
            "within_tolerance": held,
            "records": records,
        },
        lines,
        (0 if held else 1),
    )


def table(cost: Cost, batch: int) -> list[str]:
    """Format a prediction: what each section saves for the backward pass, and all else a step holds."""
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
            *([("the same, on disk", cost.written)] if cost.written else []),
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


def budget_lines(report: budget.BudgetReport, batch: int) -> list[str]:
    verdict = "fits" if report.fits else "does not fit"
    largest = (
        f"at most {report.largest_batch} images fit"
        if report.largest_batch
        else f"not even one image fits, which takes {budget.digits(report.least)}"
    )
    lines = [
        f"budget {budget.digits(report.budget)}: a micro-batch of {batch} takes {budget.digits(report.peak)} and "
        f"{verdict}; {largest}",
        f"{'single changes, the best first':<42}  saved MB  extra GFLOPs  fits  key=value",
    ]
    lines += [
        f"  {c.what:<40}  {c.bytes / MB:>8.3f}  {c.flops / 1e9:>+12.1f}  {'yes' if c.fits else '-':<4}  {c.overrides}"
        for c in report.changes
    ]
    return lines
