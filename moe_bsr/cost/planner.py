"""Check a configuration against a memory budget: does it fit, with how many images, and which change saves most.

All numbers come from `predict`. Nothing is run.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError, require
from moe_bsr.cost.predict import Cost, predict
from moe_bsr.model.multitask import build_on_meta
from moe_bsr.model.storage import STORAGES

UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}
MAX_IMAGES = 2**12  # upper limit of the search for the largest micro-batch


@dataclass(frozen=True, slots=True)
class Change:
    """One change to a configuration and its effect.

    Attributes:
        what: the change in words. overrides: the same as on the command line.
        bytes: reduction of the step's peak. flops: additional FLOPs per step (negative: fewer).
        fits: whether the changed configuration fits the budget.
    """

    what: str
    overrides: str
    bytes: int
    flops: int
    fits: bool

    @property
    def worth(self) -> tuple[bool, float]:
        """Sort key: changes without extra compute come first, by bytes; then the others, by bytes per extra FLOP."""
        return self.flops <= 0, self.bytes if self.flops <= 0 else self.bytes / self.flops


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """A configuration compared with a memory budget. All sizes are in bytes.

    Attributes:
        peak: with the configured micro-batch. floor: the parameters, which any budget must exceed.
        least: peak with one image per micro-batch.
        largest_batch: the largest number of images per micro-batch that fits; 0 if not even one does.
        changes: all single changes that save memory, the best first.
    """

    budget: int
    peak: int
    floor: int
    least: int
    fits: bool
    largest_batch: int
    changes: list[Change]


def parse_bytes(text: str, option: str = "--budget", least: int = 1) -> int:
    """Parse "600MB", "1.5GB" or a number of bytes. MB = 2^20 bytes.

    Args:
        option: the option that errors name.
        least: the smallest size that is accepted.
    Raises:
        ConfigError: the text is anything else.
    """
    number = text.strip().upper()
    unit = next((u for u in ("KB", "MB", "GB", "B") if number.endswith(u)), "")
    try:
        value = float(number.removesuffix(unit)) * UNITS.get(unit, 1)
    except ValueError:
        value = 0.0
    bound = "above 0" if least == 1 else f"of at least {least:,} bytes"
    examples = "such as 600MB, 1.5GB or 4000000 (bytes)"
    require(0 < value < 2**60 and value >= least, option, text, f"a size {bound} {examples}")
    return int(value)


def digits(size: int) -> str:
    """Format bytes exactly, so that a peak above the budget never looks equal to it."""
    return f"{size:,} B ({size / 2**20:.3f} MB)"


def answer(config: Config, classes: dict[str, int], budget: int, *, batch: int, precision: str) -> BudgetReport:
    """Compare a configuration that trains with micro-batches of `batch` images with a budget of `budget` bytes.

    Raises:
        ConfigError: the budget is smaller than the parameters alone.
    """
    model = build_on_meta(config, classes)

    @functools.cache
    def cost_of(images: int) -> Cost:
        return predict(model, config, batch=images, precision=precision, all_tasks=True)

    cost = cost_of(batch)
    floor = cost.parameters
    require(
        budget >= floor,
        "--budget",
        digits(budget),
        f"the parameters alone take {digits(floor)}: take a smaller backbone or fewer experts",
    )
    changes = [
        Change(what, overrides, cost.peak - other.peak, other.step_flops - cost.step_flops, other.peak <= budget)
        for what, overrides, other in _alternatives(config, classes, batch, precision)
    ]
    return BudgetReport(
        budget,
        cost.peak,
        floor,
        cost_of(1).peak,
        cost.peak <= budget,
        largest(lambda images: cost_of(images).peak, budget),
        sorted((c for c in changes if c.bytes > 0), key=lambda c: c.worth, reverse=True),
    )


def largest(peak: Callable[[int], int], budget: int) -> int:
    """Return the largest n up to MAX_IMAGES with peak(n) <= budget; 0 if there is none.

    Args:
        peak: a non-decreasing function. It is nearly linear, so interpolation needs few calls.
    """
    low, below, high, above = 0, 0, 1, peak(1)
    while above <= budget:
        if high == MAX_IMAGES:
            return high
        slope = max((above - below) / (high - low), 1) if low else above
        low, below = high, above
        high = min(max(2 * high, int(high + 1.01 * (budget - above) / slope) + 1) if low > 1 else 2, MAX_IMAGES)
        above = peak(high)
    while high - low > 1:
        middle = low + int((budget - below) / (above - below) * (high - low)) if low else low + 1
        middle = min(max(middle, low + 1), high - 1)
        at_middle = peak(middle)
        if at_middle <= budget:
            low, below = middle, at_middle
        else:
            high, above = middle, at_middle
    return low


def _alternatives(
    config: Config, classes: dict[str, int], batch: int, precision: str
) -> Iterator[tuple[str, str, Cost]]:
    """Yield (what, overrides, cost) for every single change that applies to the configuration."""
    plan, depth = config.plan, len(build_on_meta(config, classes).plan)
    options: list[tuple[str, dict[str, Any]]] = []
    # Keep rates in a list belong to the blocks in the order given. Each block moves in place and keeps its rate.
    place = {block: max(i, block - 1) for i, block in enumerate(sorted(plan.drop_blocks))}
    earlier = [place[block] for block in plan.drop_blocks]
    if earlier != plan.drop_blocks:
        options.append(("drop one block earlier", {"plan.drop_blocks": earlier}))
    if not plan.drop_blocks and depth > 1:
        options.append(("drop half of the tokens", {"plan.drop_blocks": [depth // 4], "plan.keep_rate": 0.5}))
    trained = list(range(depth)) if plan.train_blocks == "all" else sorted(plan.train_blocks)
    if trained:
        fewer = trained[1:]
        dense = " and dense" if trained[0] in plan.moe_blocks else ""
        embedding = "the embedding and " if plan.train_blocks == "all" else ""
        options.append(
            (
                f"leave {embedding}block {trained[0]} frozen{dense}",
                {"plan.train_blocks": fewer, "plan.moe_blocks": [i for i in plan.moe_blocks if i in fewer]},
            )
        )
    faithful = [name for name in STORAGES if name != config.storage and not STORAGES[name].coarse]
    options += [(f"store {name}", {"storage": name}) for name in faithful]
    if config.train.optimizer == "adamw":
        options.append(("keep moments in 8 bits", {"train.optimizer": "adamw8"}))
    if not config.train.step_in_backward:
        step: tuple[str, dict[str, Any]] = ("step in the backward pass", {"train.step_in_backward": True})
        if config.train.grad_clip_norm is not None and config.train.grad_clip_per == "model":
            step = (f"{step[0]}, clip per block", step[1] | {"train.grad_clip_per": "block"})
        options.append(step)
    if precision == "fp32":
        options.append(("compute in bf16", {"runtime.precision": "bf16"}))
    if plan.moe_blocks and config.moe.experts == "low_rank" and config.moe.rank > 1:
        options.append(("experts of half the rank", {"moe.rank": config.moe.rank // 2}))
    if plan.moe_blocks and config.moe.experts == "full" and config.moe.mlp_ratio > 1:
        options.append(("narrower experts", {"moe.mlp_ratio": config.moe.mlp_ratio // 2}))
    for what, keys in options:
        try:
            changed = configuration.replace(config, **keys)
            bf16 = "runtime.precision" in keys
            cost = predict(
                build_on_meta(changed, classes),
                changed,
                batch=batch,
                precision="bf16" if bf16 else precision,
                all_tasks=True,
            )
        except ConfigError:
            continue  # impossible for this backbone (an expert ratio that does not divide its FFN)
        if cost.written:
            what += f", {cost.written / 2**20:.0f} MB of disk"
        yield what, " ".join(configuration.as_overrides(keys)), cost
