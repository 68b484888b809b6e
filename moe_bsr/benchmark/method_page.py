"""Tables of compare-methods results, as text and as docs/methods.md: one per file, targets, published figures."""

from statistics import fmean
from typing import Any

from moe_bsr.benchmark import method_targets, targets
from moe_bsr.evaluation.metrics import over_seeds
from moe_bsr.runtime.text_tables import as_markdown as markdown_table
from moe_bsr.runtime.text_tables import as_text as text_table

MIB = 2**20
Results = dict[str, dict[str, Any]]  # by file name

INTRODUCTION = """\
# All methods side by side

Made by `moe-bsr compare-methods --from-json results/methods_*.json --markdown`; do not edit.

A method is a few lines in `configs/methods/all.yaml`: a set of changes to one MoE-BSR configuration. All methods share
one training step, one cost model and one memory meter. Only `timm_full` is plain code without this package.

```
moe-bsr compare-methods CONFIG data.root=DIR --out methods.json           # cost, time, gradients: minutes
moe-bsr compare-methods CONFIG data.root=DIR --out methods.json --train   # accuracy too: hours
```

* **peak**: most bytes of tensors alive during one update, with weights, gradients and optimizer state, without the
  images. MB are 2^20 bytes. The next column is the error of the prediction.
* **kept**: bytes saved for the backward pass, per image.
* **cosine, error**: the gradient of one batch against the gradient of the same plan with storage `exact`. They are 1
  and 0 where nothing is rounded.
* **a task more**: bytes that one more task adds to a multitask model: its head and its routers. A separate model per
  task would add all trained weights, at four bytes each.
* **GFLOPs**: forward and backward pass of one image. A multiply-add counts as two.
* **time**: time of an update divided by that of the reference, both measured in turns.
* A **probe** has no updates. Its peak is that of computing the features of 1,000 images and solving for the heads, its
  kept bytes are the features of an image, and its penalty is chosen on validation images, in place of a learning rate.
"""

ACCURACY = """\
**Accuracy** is the mean of {tasks}. Each method has the same tuning budget: three learning rates, {updates}
updates each, compared on {val} validation images per task (`val`). With the best one it trains for {minutes:g} minutes,
counted from opening the images, and is scored once on the test images (`test`, after so many `updates`). Intervals are
95 %: over images for one seed, over seeds (Student's t) for more.
"""

PUBLISHED = """
## What papers print

Each paper counts memory by a rule of its own, named in the row. No two rules are alike, and none of these figures is a
measurement made here. `moe-bsr reproduce` rebuilds those of BSR. The picture shows them as hollow marks where
accuracies of that backbone and task are on file.
"""


def as_text(results: Results) -> str:
    parts = [f"{heading(result)}\n{text_table(rows(result))}" for result in results.values()]
    if judged := _judged(results):
        parts.append(text_table(targets.table(judged)))
    return "\n\n".join(parts)


def as_markdown(results: Results) -> str:
    parts = [INTRODUCTION, "![Peak, FLOPs and time of all methods](images/methods.png)\n"]
    for name, result in results.items():
        made = _made(name, result) + _about_accuracy(result)
        parts.append(f"## {heading(result)}\n\n{made}\n\n{markdown_table(rows(result))}\n")
        parts.append(_legend(result))
    if judged := _judged(results):
        about = "DeiT-S, 224 px, 32 images, measured. Methods are compared with figures in fp32, also those in bf16."
        parts.append(f"## Targets\n\n{about}\n\n{markdown_table(targets.table(judged))}\n")
    parts.append(f"{PUBLISHED.strip()}\n\n{markdown_table(_published(results))}")
    return "\n".join(parts)


def _judged(results: Results) -> list[dict[str, Any]]:
    return targets.judge(method_targets.TARGETS, method_targets.measured(results))


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Return one row per method below a row of titles, with a dash for unknown values."""
    titles = ["method", "trained, M", "peak, MB", "predicted", "kept, MiB", "cosine", "error", "optimizer, MB"]
    titles += ["a task more, kB", "GFLOPs", "time"]
    trained = any("equal_updates" in row["train_info"] for row in result["methods"].values())
    table = [titles + trained * ["rate", "val top-1 %", "test top-1 %", "seeds", "updates"]]
    for name, row in _ranked(result["methods"]):
        info = row["train_info"]
        cost, fidelity = info["cost"], info.get("gradient") or {}
        peak = cost["peak_bytes"]
        cells = [
            name,
            f"{cost['trained_parameters'] / 1e6:.3f}",
            f"{peak['measured'] / MIB:.0f}",
            _off(peak),
            f"{cost['kept_bytes']['measured'] / MIB:.3f}",
            f"{fidelity['cosine']:.4f}" if fidelity else "-",
            f"{fidelity['error']:.4f}" if fidelity else "-",
            f"{cost['optimizer_bytes'] / MIB:.1f}",
            f"{cost['task_bytes'] / 1000:.0f}",
            f"{cost['step_flops'] / 1e9:.2f}",
            f"{info['time']['ratio']:.2f}" if info.get("time") else "-",
        ]
        table.append(cells + trained * _accuracy(info))
    return table


def _ranked(methods: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, row) pairs from the best test accuracy to the worst; rows without one stay in their order, last."""

    def key(pair: tuple[str, dict[str, Any]]) -> float:
        info = pair[1]["train_info"]
        return -test_accuracy(info)[0] if info.get("equal_seconds") else 0.0

    return sorted(methods.items(), key=key)


def _accuracy(info: dict[str, Any]) -> list[str]:
    tuned, runs = info.get("equal_updates"), list(info.get("equal_seconds", {}).values())
    rate, val = "-", "-"
    if tuned:
        rate = max(tuned["rates"], key=tuned["rates"].get)
        val = f"{tuned['val_top1']:.1f} ± {tuned['val_half_width']:.1f}"
    if not runs:
        return [rate, val, "-", "-", "-"]
    mean, half_width = test_accuracy(info)
    return [rate, val, f"{mean:.1f} ± {half_width:.1f}", f"{len(runs)}", f"{fmean(r['updates'] for r in runs):.0f}"]


def test_accuracy(info: dict[str, Any]) -> tuple[float, float]:
    """Return the mean test accuracy of a row's timed runs and the half width of its 95 % interval, in percent."""
    runs = list(info["equal_seconds"].values())
    found = over_seeds([run["mean_top1"] for run in runs])
    return found["mean"], runs[0]["half_width"] if len(runs) == 1 else found["high"] - found["mean"]


def _about_accuracy(result: dict[str, Any]) -> str:
    trained = [row["train_info"] for row in result["methods"].values() if row["train_info"].get("equal_seconds")]
    if not trained:
        return ""
    run, data = next(iter(trained[0]["equal_seconds"].values())), result["base"]["data"]
    *tasks, last = run["tasks"]
    about = ACCURACY.format(
        tasks=f"{', '.join(tasks)} and {last}" if tasks else last,
        updates=next(info["equal_updates"]["updates"] for info in trained if info["equal_updates"]),
        val="all" if data["val_images"] is None else data["val_images"],
        minutes=run["minutes"],
    )
    return f"\n\n{about.strip()}"


def _off(sizes: dict[str, float | None]) -> str:
    if sizes["predicted"] is None:
        return "-"
    return f"{100 * (sizes['predicted'] / sizes['measured'] - 1):+.2f} %"


def heading(result: dict[str, Any]) -> str:
    """Return backbone, batch size and, unless fp32, precision."""
    base, precision = result["base"], result["environment"]["precision"]
    heading = f"{base['backbone']['name'].partition('.')[0]}, {base['train']['batch_size']} images"
    return heading if precision == "fp32" else f"{heading}, {precision}"


def _made(name: str, result: dict[str, Any]) -> str:
    about = result["environment"]
    weights = "random weights" if result["base"]["backbone"]["weights"] == "random" else "pretrained weights"
    return (
        f"`results/{name}`: cost of one task of {result['classes']} classes, {weights}, {about['precision']}, "
        f"{about['processor']}, threads: {about['threads']}, torch {about['torch']}. "
        f"Times are divided by that of `{result['reference']}`."
    )


def _legend(result: dict[str, Any]) -> str:
    lines = []
    for name, row in result["methods"].items():
        method = row["run_info"]["method"]
        lines.append(f"* `{name}`: {method['title']}{'; ' * bool(method['source'])}{method['source']}.")
    return "\n".join([*lines, ""])


def _published(results: Results) -> list[list[str]]:
    table = [["method", "backbone", "task", "top-1 %", "memory, MB", "whose rule"]]
    seen = {name: row["run_info"]["method"] for r in results.values() for name, row in r["methods"].items()}
    for name, method in seen.items():
        for each in method["published"]:
            numbers = [f"{each['top1']:g}", f"{each['memory_mb']:g}"]
            table.append([name, each["backbone"], each["task"], *numbers, each["rule"]])
    return table
