"""Targets of the benchmark: for each ratio the published value, the bound, and the limit that ours must reach."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FAST = 12  # speed-up over stock timm from which a storage counts in `memory_gain`
Results = dict[str, dict[str, dict[str, Any]]]  # group -> case -> {"seconds": ..., "memory": ...}


@dataclass(frozen=True, slots=True)
class Measurement:
    """A measured ratio.

    Attributes:
        detail: the cases that are compared, for the table. others: the same ratio for all other cases, by name.
        holds: whether the target's other conditions are met.
    """

    value: float
    detail: str
    others: dict[str, float]
    holds: bool = True


@dataclass(frozen=True, slots=True)
class Target:
    """One target, a row of the table.

    Attributes:
        what: title. published: value from the literature, or "".
        bound: limit that no implementation can pass, or "".
        limit: the goal. at_least: True if the ratio must not be below it (a gain), False if not above it (a cost).
        value: computes the measurement from the results of a benchmark run.
    """

    what: str
    published: str
    bound: str
    limit: float
    at_least: bool
    value: Callable[[Results], Measurement]


def step_seconds(results: Results, group: str, case: str) -> float:
    """Return the median time of a step in seconds, over all rounds."""
    return statistics.median(t for of_round in results[group][case]["seconds"] for t in of_round)


def gain(group: str, slow: str, fast: str) -> Callable[[Results], Measurement]:
    """Return a function that computes the ratio of two median step times.

    Its detail has the range of the ratios of single rounds. `others` compares all other cases with `fast`.
    """

    def value(results: Results) -> Measurement:
        cases = results[group]
        rounds = zip(cases[slow]["seconds"], cases[fast]["seconds"], strict=True)
        ratios = [statistics.median(a) / statistics.median(b) for a, b in rounds]
        against = {
            case: step_seconds(results, group, case) / step_seconds(results, group, fast)
            for case in cases
            if case != fast
        }
        detail = f"{slow} / {fast}; rounds {min(ratios):.2f} to {max(ratios):.2f}"
        return Measurement(against[slow], detail, against)

    return value


def memory_gain(results: Results) -> Measurement:
    """Compare bytes kept per image: stock timm in fp32 over our leanest storage that is `FAST` times as fast."""
    group, stock = results["fp32"], "timm fp32 stock"
    whole = step_seconds(results, "fp32", stock)
    speeds = {case: whole / step_seconds(results, "fp32", case) for case in group if case.startswith("bsr ")}
    fast = [case for case, speed in speeds.items() if speed >= FAST]
    kept = {case: about["memory"]["kept_per_image"] for case, about in group.items()}
    leanest = min(fast or speeds, key=kept.__getitem__)
    detail = f"{leanest}: {kept[leanest] / 2**20:.3f} MiB an image at {speeds[leanest]:.1f}x the speed"
    if not fast:
        detail += f", slower than the {FAST:g}x asked for"
    return Measurement(
        kept[stock] / kept[leanest],
        detail,
        {case: size / kept[leanest] for case, size in kept.items() if case != leanest},
        bool(fast),
    )


def peak_ratio(group: str, plan: str) -> Callable[[Results], Measurement]:
    """Return a function that computes the peak of a step over the peak of inference, weights in both.

    It takes the storage with the smallest ratio among the cases whose names begin with `plan`.
    """

    def value(results: Results) -> Measurement:
        ratios = {
            case: (m["weights"] + max(m["transients"].values())) / (m["weights"] + m["inference_peak"])
            for case, about in results[group].items()
            for m in [about["memory"]]
            if "_ffn " not in case
        }
        least = min((case for case in ratios if case.startswith(plan)), key=ratios.__getitem__)
        return Measurement(ratios[least], least, {case: ratio for case, ratio in ratios.items() if case != least})

    return value


def products_share(case: str) -> Callable[[Results], Measurement]:
    """Return a function that computes the isolated time of a step's matrix products over the step's time."""

    def value(results: Results) -> Measurement:
        products = results["fp32"][case]["products"]
        share = products["seconds"] / step_seconds(results, "fp32", case)
        return Measurement(share, f"{case}: {products['flops'] / 1e9:.0f} GFLOPs in products a step", {})

    return value


TARGETS = [
    Target(
        "BSR step bf16 against stock timm full fine-tuning fp32",
        "2.43x (GPU)",
        "",
        15,
        True,
        gain("fp32", "timm fp32 stock", "bsr bf16"),
    ),
    Target("both bf16, against stock timm", "", "", 6, True, gain("bf16", "timm bf16 stock", "bsr bf16")),
    Target("both fp32, against stock timm", "", "", 4.8, True, gain("fp32", "timm fp32 stock", "bsr fp32")),
    Target(
        "the method's own gain: BSR against our full fine-tuning, bf16",
        "",
        "3.64x by FLOPs",
        3.4,
        True,
        gain("bf16", "full bf16", "bsr bf16"),
    ),
    Target("the same in fp32", "", "3.64x by FLOPs", 3.4, True, gain("fp32", "full fp32", "bsr fp32")),
    Target(
        "MoE-BSR against our MoE baseline, bf16",
        "2.3x by FLOPs",
        "3.52x by FLOPs",
        3.2,
        True,
        gain("experts bf16", "moe_full bf16", "moe_bsr bf16"),
    ),
    Target(
        "the same in fp32",
        "2.3x by FLOPs",
        "3.52x by FLOPs",
        3.2,
        True,
        gain("experts fp32", "moe_full fp32", "moe_bsr fp32"),
    ),
    Target(
        "MoE FFN forward + backward against a dense one of equal products, bf16",
        "1.2-2.2x",
        "1",
        1.25,
        False,
        gain("experts bf16", "moe_ffn bf16", "dense_ffn bf16"),
    ),
    Target("the same in fp32", "1.2-2.2x", "1", 1.25, False, gain("experts fp32", "moe_ffn fp32", "dense_ffn fp32")),
    Target(
        "activation bytes kept per image: stock timm fp32 against ours, step >= 12x faster",
        "62x (WASI)",
        "",
        100,
        True,
        memory_gain,
    ),
    Target(
        "peak of a BSR training step against a no_grad forward, weights in both",
        "",
        "1",
        1.25,
        False,
        peak_ratio("fp32", "bsr bf16"),
    ),
    Target("the same in fp32", "", "1", 1.25, False, peak_ratio("fp32", "bsr fp32")),
    Target("the same for MoE-BSR, bf16", "", "1", 1.5, False, peak_ratio("experts bf16", "moe_bsr bf16")),
    Target("the same for MoE-BSR, fp32", "", "1", 1.5, False, peak_ratio("experts fp32", "moe_bsr fp32")),
    Target(
        "best isolated times of the step's own products / step time, BSR bf16",
        "",
        "1",
        0.7,
        True,
        products_share("bsr bf16"),
    ),
    Target("the same in fp32", "", "1", 0.7, True, products_share("bsr fp32")),
]


def judge(results: Results) -> list[dict[str, Any]]:
    """Return a row for each target whose cases were run."""
    rows = []
    for target in TARGETS:
        try:
            measured = target.value(results)
        except (KeyError, ValueError):  # its cases were left out
            continue
        reached = measured.holds and (
            measured.value >= target.limit if target.at_least else measured.value <= target.limit
        )
        rows.append(
            {
                "what": target.what,
                "published": target.published,
                "bound": target.bound,
                "target": f"{'>=' if target.at_least else '<='} {target.limit:g}x",
                "value": measured.value,
                "reached": reached,
                "detail": measured.detail,
                "others": measured.others,
            }
        )
    return rows
