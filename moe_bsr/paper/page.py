"""Format the recomputed figures as text for a terminal and as `docs/paper_tables.md`."""

from moe_bsr.paper.bsr_rule import MB
from moe_bsr.paper.rebuild import BATCH, KEPT, RULES, STEP_MEMORY, Result
from moe_bsr.paper.settings import ours
from moe_bsr.paper.tables import FIGURES, REMARKS, TITLES

INTRODUCTION = """\
# The paper's cost figures, rebuilt

Made by `python tools/reproduce.py --markdown`; do not edit.

This page has every memory and FLOPs figure printed in Tables 1 to 8 and Figure 1 of *Block Selective
Reprogramming for On-device Training of Vision Transformers*
([arXiv 2405.10951](https://arxiv.org/abs/2405.10951)). Each is recomputed from shapes by the rule that produced
it. MB are 2^20 bytes. "GMacs" are 1e9 multiply-adds of the forward pass (one multiply-add is two floating-point
operations). No figure of the paper counts the backward pass. Blocks are counted from 0. Images have 224 px,
patches 16, which gives 197 tokens. The batch is 128 unless a table says otherwise.

A figure counts as reproduced within 0.3 %, or within half a unit of its last printed digit. A **corrected** row
has the correct value for the setting as described. An **other rule** row has the value by the rule of the rows
beside it. A **not reproduced** row says what was tried.
"""

RULES_INTRODUCTION = """
## What each rule charges

For the 197 tokens of a full-length block, with one token tensor T (197 x width x 4 bytes) and the attention
map A (heads x 197 x 197 x 4 bytes):

| | trained block | frozen block on the gradient path | frozen block before it |
| --- | --- | --- | --- |
| paper's rule | 16 T + A | 7 T + A | 0 |
| Back Razor's rule | 18 T + A | 7 T + A | 7 T + A |
| autograd, plain PyTorch | 16 T + A | 9 T + A | 0 |

Autograd keeps 16 more bytes per token for the statistics of the two norms. The paper's rule leaves out the
inputs of frozen norms, what `gather` keeps at a drop, gradients, optimizer state and all temporaries of the
backward pass. It charges one byte for a frozen parameter, although the runs keep four. The released estimators
do not cover expert layers. Below, router and experts are charged as linear layers, and the experts' have four
rows for each token.
"""

KEPT_INTRODUCTION = """
## What these settings really keep

The table has the activations kept for the backward pass in MB per image, float32. *Autograd, plain PyTorch*
counts every distinct storage that the saved-tensor hooks see, without parameters, in a direct implementation of
the method (timm's block with an explicit attention map, `gather` at the drops). It is a closed form, which the
tests compare with the hooks. *Our code* is what `tools/cost.py --mode exact` predicts for storage `exact`,
without the images. The last column is the peak of our whole training step in MB, at batch 128 with SGD and
momentum, parameters included.
"""


def as_text(results: list[Result]) -> str:
    """Return plain tables, one for each published table."""
    width = max(len(r.row) for r in results)
    lines = []
    for table, rows in _by_table(results).items():
        lines += [
            "",
            f"{_name(table)}: {TITLES[table]}",
            f"{'':{width}}  {'':20}{'published':>10}{'ours':>10}{'diff %':>9}  rule",
        ]
        for r in rows:
            state = " OFF" if r.off else "" if r.status == "reproduced" else f" ({r.status})"
            ours, difference = _numbers(r)
            lines.append(
                f"{r.row:{width}}  {r.column:20}{_printed(r):>10}{ours:>10}{difference:>9}  {r.rule or '-'}{state}"
            )
            if r.note:
                lines.append(f"{'':{width}}    {r.note}")
        if table in REMARKS:
            lines.append(REMARKS[table])
    return "\n".join(lines[1:])


def as_markdown(results: list[Result]) -> str:
    """Return the page in Markdown, for all tables that occur in the results."""
    parts = [INTRODUCTION, RULES_INTRODUCTION, _rules({r.rule for r in results})]
    for table, rows in _by_table(results).items():
        parts += [
            f"\n## {_name(table)}: {TITLES[table]}\n",
            "| row | figure | published | ours | difference | rule | |",
            "| --- | --- | --: | --: | --: | --- | --- |",
        ]
        for r in rows:
            ours, difference = _numbers(r)
            status = "" if r.status == "reproduced" else f"**{r.status}**"
            cells = [
                r.row,
                r.column,
                _printed(r),
                ours,
                difference and f"{difference} %",
                r.rule or "-",
                "; ".join(text for text in (status, r.note) if text),
            ]
            parts.append(f"| {' | '.join(cells)} |")
        if table in REMARKS:
            parts.append(f"\n{REMARKS[table]}")
    parts += [KEPT_INTRODUCTION, *_kept(results)]
    return "\n".join(parts)


def _rules(used: set[str | None]) -> str:
    return "\n".join(f"* **{name}**: {rule.text}" for name, rule in RULES.items() if name in used)


def _kept(results: list[Result]) -> list[str]:
    tables = {r.table for r in results}
    settings = {str(f.setting): f.setting for f in FIGURES if f.table in tables and f.rule in STEP_MEMORY}
    first, *others = KEPT
    titles = ["setting", first, *(f"{who} | over the rule" for who in others), "our step"]
    lines = [f"| {' | '.join(titles)} |", "| --- |" + " --: |" * (2 + 2 * len(others))]
    for text, setting in settings.items():
        rule, cost = KEPT[first](setting), ours(setting, BATCH)
        values = [KEPT[who](setting) for who in others]
        cells = [
            text,
            f"{rule:.2f}",
            *("- | -" if v is None else f"{v:.2f} | {v / rule:.2f}" for v in values),
            "-" if cost is None else f"{cost.peak / MB:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _by_table(results: list[Result]) -> dict[str, list[Result]]:
    return {table: rows for table in TITLES if (rows := [r for r in results if r.table == table])}


def _name(table: str) -> str:
    return table if table.startswith("Figure") else f"Table {table}"


def _printed(r: Result) -> str:
    return f"{r.published:g}"


def _numbers(r: Result) -> tuple[str, str]:
    if r.ours is None:
        return "-", ""
    digits = 1 if r.ours >= 100 else 3
    return f"{r.ours:.{digits}f}", f"{100 * r.relative_difference:+.2f}"
