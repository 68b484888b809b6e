"""Targets for the memory of an update on DeiT-S with 32 images, and whether measured methods reach them."""

from collections.abc import Callable
from typing import Any

MIB = 2**20
SLOWEST = 1.25  # largest time over the reference of a method that counts
NEAR = 0.99  # smallest cosine of gradients of a method that counts
BACKBONE, BATCH = "deit_small_patch16_224", 32


def judge(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return one row per target and precision whose methods were measured, below a row of titles; empty without any.

    What a method is compared with was always measured in fp32.
    """
    methods: dict[str, dict[str, dict[str, Any]]] = {"fp32": {}}  # train_info by precision and method
    for result in results.values():
        base, precision = result["base"], result["environment"]["precision"]
        if base["backbone"]["name"].partition(".")[0] == BACKBONE and base["train"]["batch_size"] == BATCH:
            of_precision = methods.setdefault(precision, {})
            of_precision |= {name: row["train_info"] for name, row in result["methods"].items()}
    rows = [
        [what, precision, *row]
        for what, *target in TARGETS
        for precision, measured in methods.items()
        # In bf16 the kept bytes also contain copies of weights, whatever the number of images.
        if (precision == "fp32" or "peak_bytes" in target)
        and (row := _row(measured, methods["fp32"], *target)) is not None
    ]
    titles = ["what", "in", "beside", "must reach", "reaches", "by", "predicted", "time", "reached"]
    return [titles, *rows] if rows else []


def _row(
    methods: dict[str, dict[str, Any]],
    anchors: dict[str, dict[str, Any]],
    anchor: str | None,
    ours: Callable[[str], bool],
    of: str,
    limit: float,
    slowest: float | None,
) -> list[str] | None:
    fast = [name for name in methods if ours(name) and _counts(methods[name], slowest)]
    if not fast or anchor is not None and anchor not in anchors:
        return None
    best = min(fast, key=lambda name: methods[name]["cost"][of]["measured"])
    sizes, time = methods[best]["cost"][of], methods[best].get("time")
    off = f"{100 * (sizes['predicted'] / sizes['measured'] - 1):+.2f} %"
    if anchor is None:
        value, reached = f"{sizes['measured'] / MIB:.2f} MiB", sizes["measured"] <= limit * MIB
        asked = f"at most {limit:g} MiB"
    else:
        ratio = anchors[anchor]["cost"][of]["measured"] / sizes["measured"]
        value, reached, asked = f"{ratio:.1f}x", ratio >= limit, f"{limit:g}x less"
    told = f"{time['ratio']:.2f}" if time else "-"
    return [anchor or "-", asked, value, best, off, told, "yes" if reached else "no"]


def _counts(info: dict[str, Any], slowest: float | None) -> bool:
    near = (info.get("gradient") or {"cosine": 1.0})["cosine"] >= NEAR
    return near and (slowest is None or "time" not in info or info["time"]["ratio"] <= slowest)


def _bsr(name: str) -> bool:
    return name.startswith("bsr")


def _moe(name: str) -> bool:
    return name.startswith("moe_bsr") and "low_rank" not in name


# what, anchor, which methods count, quantity, must reach, slowest step that counts
TARGETS: list[tuple[str, str | None, Callable[[str], bool], str, float, float | None]] = [
    ("peak of an update, BSR", "timm_full", _bsr, "peak_bytes", 12.0, SLOWEST),
    ("peak of an update, MoE-BSR", "moe_full", _moe, "peak_bytes", 5.0, None),
    ("the same with low-rank experts", "moe_full", lambda name: "low_rank" in name, "peak_bytes", 12.0, None),
    ("kept of an image, BSR", "timm_full", _bsr, "kept_bytes", 400.0, None),
    ("kept of an image, BSR, exact", None, lambda name: name == "bsr", "kept_bytes", 9.4, None),
]
