"""Measure what dropping tokens costs in accuracy before training: a linear probe's accuracy against FLOPs, by setting.

    moe-bsr drops configs/deit_tiny_moe_bsr.yaml tasks=[cifar100] data.root=data
    moe-bsr drops configs/deit_tiny_moe_bsr.yaml --images 4000 --at 6,9:0.5 4,6,8:0.7,0.5,0.5 --json > drops.json

The dropping of CONFIG is compared with none, with milder dropping, with the other ways to rank and fuse tokens, with
merging (where keep rates are 0.5 or more), and with other blocks at the same FLOPs. With --at only these
BLOCKS:KEEP_RATES are tried, beside none and the dropping of CONFIG; with tokens.reduce=merge they merge tokens instead.

Probes read the class tokens of plan.head_blocks too. All settings are scored on the same validation images. No test
image is opened, and nothing is written. Blocks that several settings share are computed once.

Exit status: 0 done, 2 invalid arguments or input.
"""

import argparse
import json
from statistics import fmean
from typing import TYPE_CHECKING

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say

if TYPE_CHECKING:
    from moe_bsr.benchmark.drop_settings import DropSetting
    from moe_bsr.benchmark.drops import Row

Places = tuple[tuple[int, float], ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_overrides(parser)
    help = "use at most N training images of each task, and half as many for validation (default: 2000)"
    parser.add_argument("--images", type=run_arguments.at_least(2), default=2000, metavar="N", help=help)
    help = "try only these, such as 6,9:0.5 or 3,6:0.7,0.5"
    parser.add_argument("--at", type=places, nargs="+", action="extend", metavar="BLOCKS:RATES", help=help)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def places(text: str) -> Places:
    """Parse blocks and their keep rates, such as "3,6:0.7,0.5" (an argument type)."""
    try:
        blocks, rates = ([*part.split(",")] for part in text.split(":"))
        rates = rates * len(blocks) if len(rates) == 1 else rates
        found = tuple(sorted(zip(map(int, blocks), map(float, rates), strict=True)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: blocks and keep rates, such as 3,6:0.7,0.5") from None
    if len({at for at, _ in found}) < len(found) or not all(0 < rate <= 1 for _, rate in found):
        raise argparse.ArgumentTypeError(f"{text!r}: each block once, rates above 0 and at most 1")
    return found


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.benchmark import drops
    from moe_bsr.benchmark.drop_settings import DropSetting, candidates, setting_of
    from moe_bsr.config import load, require
    from moe_bsr.model.backbones import require_tokens
    from moe_bsr.model.multitask import build_on_meta
    from moe_bsr.runtime.device import prepare
    from moe_bsr.runtime.provenance import made_by

    config = load(arguments.config, arguments.overrides)
    require_tokens(config.backbone, "drops")
    own, config = setting_of(config), drops.frozen(config)
    model = build_on_meta(config, dict.fromkeys(config.task_names(), 2))
    asked = [DropSetting(each, own.tokens) for each in arguments.at or []]
    for setting in (own, *asked):
        outside = [at for at, _ in setting.rates if not 0 <= at < len(model.plan) - 1]
        require(not outside, "blocks", outside, f"0 to {len(model.plan) - 2}: nothing follows a drop at the last block")
    settings = list(dict.fromkeys([DropSetting(), own, *asked])) if asked else candidates(model, own)
    runtime = prepare(config.runtime)
    with runtime.in_effect():
        rows = drops.study(config, runtime, settings, arguments.images, announce)
    best, front = drops.cheapest_loss(rows, own), drops.on_the_front(rows)
    if arguments.json:
        about = made_by(runtime) | {"images": arguments.images, "own": str(own), "best": str(best.setting)}
        print(json.dumps(about | {"settings": [row.as_dict() for row in rows]}, indent=1))
        return 0
    say(table(rows, front))
    say(conclusion(rows, best, own))
    return 0


def announce(task: str, train: int, val: int) -> None:
    say(f"{task}: {train} training and {val} validation images", error=True)


def table(rows: "list[Row]", front: "list[Row]") -> str:
    """Format the settings, the most accurate first. A star marks the Pareto front of accuracy and FLOPs."""
    from moe_bsr.runtime.text_tables import as_text

    tasks = list(rows[0].top1)
    cells = [["top-1 % of a probe on validation", "FLOPs", *tasks, "mean", "lost", "+-", ""]]
    for row in sorted(rows, key=lambda row: row.lost):
        scores = [f"{row.top1[task]:.1f}" for task in tasks]
        numbers = [f"{fmean(row.top1.values()):.2f}", f"{row.lost:.1f}", f"{row.error:.1f}"]
        cells.append([str(row.setting), f"{row.flops:.1%}", *scores, *numbers, "*" if row in front else ""])
    return as_text(cells)


def conclusion(rows: "list[Row]", best: "Row", own: "DropSetting") -> str:
    """Say which setting loses least at no more FLOPs than the configuration's own, and how to set it."""
    mine = next(row for row in rows if row.setting == own)
    if best.setting == own:
        return f"At {mine.flops:.1%} of the FLOPs no setting loses less than that of the configuration, {own}."
    return (
        f"The setting of the configuration, {own}, loses {mine.lost:.1f} points at {mine.flops:.1%} of the FLOPs. At "
        f"no more FLOPs {best.setting} loses least: {best.lost:.1f}. Set it with {' '.join(best.setting.overrides())}"
    )
