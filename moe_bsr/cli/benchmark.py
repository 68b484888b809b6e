"""Measure time and memory of one training step: stock timm, the public form of BSR, and this package.

    moe-bsr benchmark                                     # DeiT-S, 224 px, batch 32: 40 minutes; with AMX, 10
    moe-bsr benchmark --backbone vit_base_patch16_224 --batch 8 --storages exact   # needs 20 GB
    moe-bsr benchmark --cases bsr full --rounds 3 --profile    # some cases, and the operators that take longest
    moe-bsr benchmark --scaling                           # against tokens, batch, experts and tasks
    moe-bsr benchmark --json > benchmark.json
    moe-bsr benchmark --from-json benchmark.json --markdown    # print its tables again

Each case runs in a process of its own, and all cases take turns, so compare figures only within one run. Weights and
images are random. Data loading is not timed. --json prints everything, including the raw times of every step.
--scaling also writes a picture.

Exit status: 0 done, 1 a measurement failed, 2 invalid arguments.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from moe_bsr.cli.main import FAILED, program

if TYPE_CHECKING:
    from moe_bsr.benchmark.cases import Case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="deit_small_patch16_224", help="a timm VisionTransformer")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images (default: the backbone's)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images per step, at least 2 (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="compute threads (default: torch's choice)")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("bf16", "fp32"),
        help="default: both, or only fp32 where the device has no bf16 instructions",
    )
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="turns of each case (default: 6)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps of a case per turn (default: 2)")
    parser.add_argument("--storages", nargs="+", metavar="NAME", help="storages of the BSR cases (default: all)")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="SUBJECT",
        help="only these: timm, explicit, full, bsr, moe_full, moe_bsr, moe_ffn, dense_ffn. A target that needs "
        "another case is left out (default: all)",
    )
    parser.add_argument("--profile", action="store_true", help="list the ten slowest operators of each case")
    parser.add_argument("--scaling", action="store_true", help="measure how step time and peak memory grow, instead")
    help = "picture of --scaling (default: scaling.png)"
    parser.add_argument("--picture", type=Path, default=Path("scaling.png"), metavar="FILE", help=help)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    help = "measure nothing, and show the output of an earlier --json"
    parser.add_argument("--from-json", type=Path, metavar="FILE", help=help)
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.benchmark import scaling

    try:
        result = json.loads(arguments.from_json.read_text()) if arguments.from_json else measure(arguments)
    except RuntimeError as error:
        print(f"{program('benchmark')}: {error}", file=sys.stderr)
        return FAILED
    if "scaling" in result:
        scaling.draw(result, arguments.picture)
        note(f"picture: {arguments.picture}")
    print(json.dumps(result, indent=1) if arguments.json else tables(result, arguments.markdown))
    return 0


def measure(arguments: argparse.Namespace) -> dict:
    """Run the cases, and return what --json prints."""
    from moe_bsr.benchmark import scaling
    from moe_bsr.benchmark.cases import PRECISIONS, suite
    from moe_bsr.config import RuntimeConfig, require
    from moe_bsr.runtime.device import bf16_is_fast, find_device, prepare
    from moe_bsr.runtime.provenance import environment

    device = find_device(arguments.device)
    shared = {
        "backbone": arguments.backbone,
        "image_size": arguments.image_size,
        "batch": arguments.batch,
        "device": str(device),
        "threads": arguments.threads,
    }
    native = bf16_is_fast(device)[0]
    require(
        arguments.batch >= 2,
        "--batch",
        arguments.batch,
        "at least 2: bytes kept per image are the growth from half the batch to all of it",
    )
    if arguments.scaling:
        result = scaling.measure(shared, "bf16" if native else "fp32", arguments.rounds, arguments.steps, note)
    else:
        chosen = arguments.precisions or (PRECISIONS if native else ["fp32"])
        precisions = [precision for precision in PRECISIONS if precision in chosen]
        groups = {
            name: [c for c in cases if not arguments.cases or c.subject in arguments.cases]
            for name, cases in suite(arguments.storages, precisions, **shared).items()
        }
        result = compare(groups, arguments)
    return {"arguments": shared, **environment(prepare(RuntimeConfig(device=str(device))))} | result


def compare(groups: "dict[str, list[Case]]", arguments: argparse.Namespace) -> dict:
    """Measure time and memory of every case of every group, and compare the figures with the targets."""
    from moe_bsr.benchmark.targets import TARGETS, judge
    from moe_bsr.config import require

    results: dict[str, dict[str, dict]] = {}
    for name, cases in groups.items():
        note(f"{name}: {len(cases)} cases")
        try:
            results[name] = run_group(cases, arguments)
        except RuntimeError as error:  # most likely out of memory; the other groups are still valid
            note(f"{name}: left out: {error}")
            results[name] = {}
    require(any(results.values()), "--cases", arguments.cases, "no group of cases could be run, see above")
    return {"groups": results, "targets": judge(TARGETS, results)}


def run_group(cases: "list[Case]", arguments: argparse.Namespace) -> dict[str, dict]:
    """Return {case: times and memory} of one group. All its processes are alive at once, and take turns."""
    from moe_bsr.benchmark.workers import interleave, workers

    results: dict[str, dict] = {}
    with workers(cases) as group:
        times = interleave(group, arguments.rounds, arguments.steps)
        for one, seconds in zip(group, times, strict=True):
            results[one.case.name] = about = {"seconds": seconds, "memory": one.ask("memory")}
            if one.case.subject in ("bsr", "moe_bsr") and one.case.storage == "exact":
                about["products"] = one.ask("products")
            if arguments.profile:
                about["hot_spots"] = one.ask("hot_spots")
    return results


def tables(result: dict, markdown: bool) -> str:
    """Format a result of this command as tables."""
    from moe_bsr.benchmark import targets
    from moe_bsr.benchmark.tables import of_cases, of_scaling
    from moe_bsr.runtime.text_tables import as_markdown, as_text

    draw = as_markdown if markdown else as_text
    blocks = [draw(of_scaling(points, name)) for name, points in result.get("scaling", {}).items()]
    groups = result.get("groups", {})
    for group, cases in groups.items():
        if cases:
            blocks.append(draw(of_cases(groups, group, result["arguments"]["batch"])))
        spots = {name: about["hot_spots"] for name, about in cases.items() if "hot_spots" in about}
        blocks += [
            draw([[name, "ms a step", "calls"], *([operator, f"{ms:.1f}", str(calls)] for operator, ms, calls in rows)])
            for name, rows in spots.items()
        ]
    if judged := targets.judge(targets.TARGETS, groups):
        blocks.append(as_markdown(targets.table(judged)) if markdown else "\n".join(target_table(judged)))
    return "\n\n".join(blocks)


def target_table(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        known = ", ".join(f"{key} {row[key]}" for key in ("published", "bound") if row[key])
        verdict = "reached" if row["reached"] else "missed"
        lines += [
            f"{verdict:<7}  {row['value']:>7.2f}{row['unit']}  {row['target']:<8}  {row['what']}"
            + (f" ({known})" if known else ""),
            f"{'':<29}{row['detail']}",
        ]
        if row["others"]:
            others = ", ".join(f"{case} {value:.2f}" for case, value in row["others"].items())
            lines += textwrap.wrap(f"the same for {others}", 110, initial_indent=" " * 29, subsequent_indent=" " * 31)
    return lines


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
