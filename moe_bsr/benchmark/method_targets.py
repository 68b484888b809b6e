"""Targets for the memory of an update on DeiT-S with 32 images, judged on results of compare-methods."""

import re
from collections.abc import Callable
from typing import Any

from moe_bsr.benchmark.targets import Measurement, Target

MIB = 2**20
SLOWEST = 1.25  # largest time over the reference of a method that counts
NEAR = 0.99  # smallest cosine of gradients of a method that counts
BACKBONE, BATCH = "deit_small_patch16_224", 32
Methods = dict[str, dict[str, dict[str, Any]]]  # train_info by precision and method


def measured(results: dict[str, dict[str, Any]]) -> Methods:
    """Collect the methods measured on this backbone with this batch size from results by file name."""
    methods: Methods = {}
    for result in results.values():
        base, precision = result["base"], result["environment"]["precision"]
        if base["backbone"]["name"].partition(".")[0] == BACKBONE and base["train"]["batch_size"] == BATCH:
            named = {name: row["train_info"] for name, row in result["methods"].items()}
            methods.setdefault(precision, {}).update(named)
    return methods


def least(
    of: str, names: str, precision: str, anchor: str | None = None, slowest: float | None = None
) -> Callable[[Methods], Measurement]:
    """Return a function that finds the method with the least memory.

    Args:
        of: quantity. names: regular expression for the methods that count. slowest: most time over the reference.
        anchor: method in fp32 whose memory is divided by the least. Without one the value is the least, in MiB.
    """

    def value(methods: Methods) -> Measurement:
        found = {
            name: info
            for name, info in methods[precision].items()
            if re.fullmatch(names, name) and _is_good(info, slowest)
        }
        best = min(found, key=lambda name: found[name]["cost"][of]["measured"])
        sizes, time = found[best]["cost"][of], found[best].get("time")
        off = 100 * (sizes["predicted"] / sizes["measured"] - 1)
        detail = f"{best}, predicted {off:+.2f} %" + (f", time {time['ratio']:.2f}" if time else "")
        if anchor is None:
            return Measurement(sizes["measured"] / MIB, detail)
        return Measurement(methods["fp32"][anchor]["cost"][of]["measured"] / sizes["measured"], f"{anchor} / {detail}")

    return value


def _is_good(info: dict[str, Any], slowest: float | None) -> bool:
    near = (info.get("gradient") or {"cosine": 1.0})["cosine"] >= NEAR
    return near and (slowest is None or "time" not in info or info["time"]["ratio"] <= slowest)


TARGETS = [
    *(
        Target(f"{what}, {precision}", limit, least("peak_bytes", names, precision, anchor, slowest))
        for what, limit, names, anchor, slowest in (
            ("peak of an update, BSR", 12, "bsr.*", "timm_full", SLOWEST),
            ("peak of an update, MoE-BSR", 5, "moe_bsr(?!.*low_rank).*", "moe_full", None),
            ("the same with low-rank experts", 12, ".*low_rank.*", "moe_full", None),
        )
        for precision in ("fp32", "bf16")
    ),
    # Only fp32: in bf16 the kept bytes also contain copies of weights, whatever the number of images.
    Target("kept of an image, BSR", 400, least("kept_bytes", "bsr.*", "fp32", "timm_full")),
    Target("kept of an image, BSR, exact", 9.4, least("kept_bytes", "bsr", "fp32"), at_least=False, unit=" MiB"),
]
