"""Results of compare-methods as text, and as docs/methods.md: a table for each file, the targets, published figures."""

from typing import Any

from moe_bsr.benchmark.method_targets import judge
from moe_bsr.runtime.text_tables import as_markdown as markdown_table
from moe_bsr.runtime.text_tables import as_text as text_table

MIB = 2**20
Results = dict[str, dict[str, Any]]  # by the name of their file

INTRODUCTION = """\
# All methods side by side

Made by `moe-bsr compare-methods --from-json results/methods_*.json --markdown`; do not edit.

Every method is a few lines of `configs/methods/all.yaml`: what it changes of one MoE-BSR configuration. The same update
runs them all, the same cost model predicts them, the same meter measures them. `timm_full` alone is plain code.

```
moe-bsr compare-methods CONFIG data.root=DIR --out methods.json           # cost, time, gradients: minutes
moe-bsr compare-methods CONFIG data.root=DIR --out methods.json --train   # accuracy too: hours
```

* **peak**: all tensors of an update at its highest moment, weights, gradients and optimizer state included, images not;
  MB are 2^20 bytes. Behind it, how far the prediction is off.
* **kept**: bytes that are alive after the forward pass because the backward pass needs them, of one image.
* **cosine, error**: of all gradients of a batch, against the same plan with storage `exact`. 1 and 0 where nothing is
  rounded.
* **a task more**: what one task more adds to a model of all tasks: its head, and its routers. A model for each task
  costs all that trains, four bytes a parameter.
* **GFLOPs**: of forward and backward, of one image; two for a multiply-add.
* **time**: of an update, over that of the reference in the same turns.
"""

PUBLISHED = """
## What papers print

Each paper counts memory by its own rule, named in the row; no two rules are alike, and none is a measurement of ours.
`moe-bsr reproduce` rebuilds BSR's. They are drawn hollow in the picture, where accuracies are on file.
"""


def as_text(results: Results) -> str:
    parts = [f"{_heading(result)}\n{text_table(rows(result))}" for result in results.values()]
    if targets := judge(results):
        parts.append(text_table(targets))
    return "\n\n".join(parts)


def as_markdown(results: Results) -> str:
    parts = [INTRODUCTION, "![Peak, FLOPs and time of all methods](images/methods.png)\n"]
    for name, result in results.items():
        parts.append(f"## {_heading(result)}\n\n{_made(name, result)}\n\n{markdown_table(rows(result))}\n")
        parts.append(_legend(result))
    if targets := judge(results):
        parts.append(f"## Targets\n\nDeiT-S, 224 px, 32 images, fp32, measured.\n\n{markdown_table(targets)}\n")
    parts.append(f"{PUBLISHED.strip()}\n\n{markdown_table(_published(results))}")
    return "\n".join(parts)


def rows(result: dict[str, Any]) -> list[list[str]]:
    """A row for each method, the first one titles; a dash where a value is not known."""
    titles = ["method", "trained, M", "peak, MB", "predicted", "kept, MiB", "cosine", "error", "optimizer, MB"]
    titles += ["a task more, kB", "GFLOPs", "time"]
    trained = any("equal_updates" in row["train_info"] for row in result["methods"].values())
    table = [titles + trained * ["rate", "val top-1 %", "test top-1 %", "in s"]]
    for name, row in result["methods"].items():
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
            f"{info['time']['ratio']:.2f}" if "time" in info else "-",
        ]
        table.append(cells + trained * _accuracy(info))
    return table


def _accuracy(info: dict[str, Any]) -> list[str]:
    updates, race = info.get("equal_updates"), info.get("equal_seconds")
    rate = max(updates["rates"], key=updates["rates"].get) if updates else "-"
    val = f"{updates['val_top1']:.1f} ± {updates['val_half_width']:.1f}" if updates else "-"
    test = f"{race['mean_top1']:.1f} ± {race['half_width']:.1f}" if race else "-"
    return [rate, val, test, f"{race['seconds']:.0f}" if race else "-"]


def _off(sizes: dict[str, float | None]) -> str:
    if sizes["predicted"] is None:
        return "-"
    return f"{100 * (sizes['predicted'] / sizes['measured'] - 1):+.2f} %"


def _heading(result: dict[str, Any]) -> str:
    base = result["base"]
    return f"{base['backbone']['name'].partition('.')[0]}, {base['train']['batch_size']} images"


def _made(name: str, result: dict[str, Any]) -> str:
    about = result["environment"]
    weights = "random weights" if result["base"]["backbone"]["weights"] == "random" else "pretrained weights"
    return (
        f"`results/{name}`: one task of {result['classes']} classes, {weights}, {about['precision']}, "
        f"{about['processor']}, threads: {about['threads']}, torch {about['torch']}. "
        f"Times are over `{result['reference']}`."
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
