"""Answer `moe-bsr cost --budget SIZE --plans`: the plans that fit into a memory size, and how to run them."""

import dataclasses
from functools import reduce
from typing import Any

from moe_bsr import config as configuration
from moe_bsr.cli.main import program
from moe_bsr.config import Config
from moe_bsr.cost.absent_gpu import absent_gpu, is_absent_gpu
from moe_bsr.cost.planner import parse_bytes
from moe_bsr.fit.plans import Catalog, Plan, front
from moe_bsr.runtime.device import prepare
from moe_bsr.runtime.text_tables import as_text

MB = 2**20


def answer(
    config: Config, classes: dict[str, int], budget: str, given: str, timed: bool
) -> tuple[dict[str, Any], list[str], int]:
    """List the plans that fit into `budget`.

    Args:
        classes: number of classes by task.
        budget: memory of the whole process, such as "900MB".
        given: the configuration and the overrides that were given, for the command that is printed.
        timed: whether blocks are timed on this machine.
    Returns:
        JSON values of all plans that fit, lines of text of those on the Pareto front, and the exit status: 1 if no plan
        fits.
    """
    limit = parse_bytes(budget)
    if is_absent_gpu(config):
        runtime, timed = absent_gpu(config), False
    else:
        runtime = prepare(config.runtime)
    catalog = Catalog(config, classes, limit, runtime, timed)
    found = catalog.plans()
    plans, near = front(found)
    result = {
        "budget": limit,
        "libraries": catalog.base,
        "least": catalog.least,
        "batch": config.train.batch_size,
        "precision": runtime.precision,
        "alike_within": near,
        "plans": [
            dataclasses.asdict(plan) | {"overrides": overrides(config, plan), "listed": plan in plans}
            for plan in sorted(found, key=lambda plan: plan.costs)
        ],
    }
    if not plans:
        least = f"the leanest plan takes {catalog.least / MB:.1f} MB, {catalog.base / MB:.0f} of them for libraries"
        return result, [f"nothing of {config.backbone.name} fits into {limit / MB:.1f} MB: {least}"], 1
    return result, lines(config, plans, result, given), 0


def lines(config: Config, plans: list[Plan], result: dict[str, Any], given: str) -> list[str]:
    """Format the plans, one per line."""
    timed = plans[0].seconds is not None
    alike = f" (alike within {result['alike_within']:.0%})" if result["alike_within"] else ""
    cells = [["s/update" if timed else "TFLOPs", "MB", "trained M", "patches %", "key=value"]]
    for plan in plans:
        spent = plan.seconds if timed else plan.flops / 1e12
        numbers = [f"{spent:.3g}", f"{plan.bytes / MB:.0f}", f"{plan.trained / 1e6:.2f}", f"{100 * plan.patches:.0f}"]
        cells.append([*numbers, overrides(config, plan)])
    table = as_text([row[:-1] for row in cells]).split("\n")
    return [
        f"{config.backbone.name}, updates of {result['batch']} images in {result['precision']}: "
        f"{len(result['plans'])} plans fit into {result['budget'] / MB:.0f} MB, {result['libraries'] / MB:.0f} of them "
        "for libraries.",
        f"The fastest first; plans that another one equals or beats in all four columns are left out{alike}.",
        *(f"{row}  {cell[-1]}" for row, cell in zip(table, cells, strict=True)),
        f"Run one: {program('train')} {given} KEY=VALUE ...",
    ]


def overrides(config: Config, plan: Plan) -> str:
    """Return the plan's differences from the configuration, as key=value for the command line."""
    tree = configuration.to_dict(config)
    changed = {
        key: value for key, value in plan.changes.items() if value != reduce(dict.__getitem__, key.split("."), tree)
    }
    return " ".join(configuration.as_overrides(changed))
