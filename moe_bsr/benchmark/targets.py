"""Targets: limits that measured figures must reach, with published values and bounds. Those of the benchmark."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FAST = 12  # speed-up over stock timm from which a storage counts in `memory_gain`
Results = dict[str, dict[str, dict[str, Any]]]  # group -> case -> {"seconds": ..., "memory": ...}


@dataclass(frozen=True, slots=True)
class Measurement:
    """A measured figure.

    Attributes:
        detail: the cases that are compared, for the table. others: the same figure for all other cases, by name.
        holds: whether the target's other conditions are met.
    """

    value: float
    detail: str
    others: dict[str, float] = field(default_factory=dict)
    holds: bool = True


@dataclass(frozen=True, slots=True)
class Target:
    """One target, a row of the table.

    Attributes:
        what: title. limit: the goal, in `unit`.
        value: computes the measurement from the results. Raises KeyError or ValueError if its cases were left out.
        at_least: True if the figure must not be below the limit (a gain), False if not above it (a cost).
        published: value from the literature, or "". bound: limit that no implementation can pass, or "".
    """

    what: str
    limit: float
    value: Callable[[Any], Measurement]
    at_least: bool = True
    published: str = ""
    bound: str = ""
    unit: str = "x"


def judge(targets: list[Target], results: Any) -> list[dict[str, Any]]:
    """Return a row for each target whose cases were run."""
    rows = []
    for target in targets:
        try:
            measured = target.value(results)
        except (KeyError, ValueError):  # its cases were left out
            continue
        within = measured.value >= target.limit if target.at_least else measured.value <= target.limit
        rows.append(
            {
                "what": target.what,
                "published": target.published,
                "bound": target.bound,
                "target": f"{'>=' if target.at_least else '<='} {target.limit:g}{target.unit}",
                "value": measured.value,
                "unit": target.unit,
                "reached": measured.holds and within,
                "detail": measured.detail,
                "others": measured.others,
            }
        )
    return rows


def table(judged: list[dict[str, Any]]) -> list[list[str]]:
    """Return the rows of `judge` as text, below a row of titles. Empty columns are left out."""
    titles = ["what", "published", "bound", "must reach", "measured", "reached", "detail"]
    texts = [
        [
            *(row[key] for key in ("what", "published", "bound", "target")),
            f"{row['value']:.2f}{row['unit']}",
            "yes" if row["reached"] else "no",
            row["detail"],
        ]
        for row in judged
    ]
    filled = [i for i in range(len(titles)) if any(row[i] for row in texts)]
    return [[row[i] for i in filled] for row in (titles, *texts)]


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
        return Measurement(share, f"{case}: {products['flops'] / 1e9:.0f} GFLOPs in products a step")

    return value


TARGETS = [
    Target(
        "BSR step bf16 against stock timm full fine-tuning fp32",
        15,
        gain("fp32", "timm fp32 stock", "bsr bf16"),
        published="2.43x (GPU)",
    ),
    Target("both bf16, against stock timm", 6, gain("bf16", "timm bf16 stock", "bsr bf16")),
    Target("both fp32, against stock timm", 4.8, gain("fp32", "timm fp32 stock", "bsr fp32")),
    Target(
        "the method's own gain: BSR against our full fine-tuning, bf16",
        3.4,
        gain("bf16", "full bf16", "bsr bf16"),
        bound="3.64x by FLOPs",
    ),
    Target("the same in fp32", 3.4, gain("fp32", "full fp32", "bsr fp32"), bound="3.64x by FLOPs"),
    Target(
        "MoE-BSR against our MoE baseline, bf16",
        3.2,
        gain("experts bf16", "moe_full bf16", "moe_bsr bf16"),
        published="2.3x by FLOPs",
        bound="3.52x by FLOPs",
    ),
    Target(
        "the same in fp32",
        3.2,
        gain("experts fp32", "moe_full fp32", "moe_bsr fp32"),
        published="2.3x by FLOPs",
        bound="3.52x by FLOPs",
    ),
    Target(
        "MoE FFN forward + backward against a dense one of equal products, bf16",
        1.25,
        gain("experts bf16", "moe_ffn bf16", "dense_ffn bf16"),
        at_least=False,
        published="1.2-2.2x",
        bound="1",
    ),
    Target(
        "the same in fp32",
        1.25,
        gain("experts fp32", "moe_ffn fp32", "dense_ffn fp32"),
        at_least=False,
        published="1.2-2.2x",
        bound="1",
    ),
    Target(
        "activation bytes kept per image: stock timm fp32 against ours, step >= 12x faster",
        100,
        memory_gain,
        published="62x (WASI)",
    ),
    Target(
        "peak of a BSR training step against a no_grad forward, weights in both",
        1.25,
        peak_ratio("fp32", "bsr bf16"),
        at_least=False,
        bound="1",
    ),
    Target("the same in fp32", 1.25, peak_ratio("fp32", "bsr fp32"), at_least=False, bound="1"),
    Target("the same for MoE-BSR, bf16", 1.5, peak_ratio("experts bf16", "moe_bsr bf16"), at_least=False, bound="1"),
    Target("the same for MoE-BSR, fp32", 1.5, peak_ratio("experts fp32", "moe_bsr fp32"), at_least=False, bound="1"),
    Target(
        "best isolated times of the step's own products / step time, BSR bf16",
        0.7,
        products_share("bsr bf16"),
        bound="1",
    ),
    Target("the same in fp32", 0.7, products_share("bsr fp32"), bound="1"),
]
