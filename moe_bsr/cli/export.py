"""Export a run for a device: ONNX graphs, shared weights, labels, a model card, and a program that needs no torch.

    moe-bsr export runs/quickstart
    moe-bsr export runs/quickstart --task petals shapes --int8 --out petals-int8
    moe-bsr export runs/quickstart --task petals --experts 8
    moe-bsr export runs/quickstart --format executorch

Writes the folder only if its graphs compute the same as the run in float32, on validation images of the run. In that
folder, `python predict.py photo.jpg` needs only numpy, Pillow and onnxruntime, and `python predict.py --check` tells
whether the device computes the same. --int8 and --experts cost some accuracy; the printed table says how much.

Exit status: 0 written, 2 invalid arguments or input, or the graphs differ (nothing is written).
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say

FORMATS = ("onnx", "executorch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_run(parser)
    run_arguments.add_tasks(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: RUN/export)")
    parser.add_argument("--int8", action="store_true", help="int8 weights: less than half the size, nearly as accurate")
    help = "keep only the N experts of each layer that a task uses most (default: all)"
    parser.add_argument("--experts", type=run_arguments.at_least(1), metavar="N", help=help)
    help = "compare graphs and run on at most N validation images of each task (default: 512)"
    parser.add_argument("--images", type=run_arguments.at_least(1), default=512, metavar="N", help=help)
    run_arguments.add_images(parser)
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="kind of the graphs (default: onnx)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    if arguments.format == "executorch" and find_spec("executorch") is None:
        raise ValueError("--format executorch: it needs a package that is not installed: pip install executorch")
    if arguments.device not in (None, "cpu"):
        raise ValueError(f"--device {arguments.device}: a run is exported on the CPU; leave it out")
    from moe_bsr.export.bundle import export
    from moe_bsr.runtime.provenance import made_by

    trained = run_arguments.loaded(arguments, device="cpu")
    result = export(
        trained,
        arguments.out,
        format=arguments.format,
        quantize=arguments.int8,
        experts=arguments.experts,
        images=arguments.images,
        on_step=lambda text: say(text, error=True),
    )
    if arguments.json:
        print(json.dumps(made_by(trained.runtime) | result, indent=1, allow_nan=False))
    else:
        print_result(result)
    return 0


def print_result(result: dict[str, Any]) -> None:
    from moe_bsr.runtime.text_tables import as_text

    say(as_text(rows(result)))
    say()
    size, whole = result["bytes"] / 1e6, result["whole_bytes"] / 1e6
    less = f" ({whole:.1f} MB with all experts)" if result["whole_bytes"] > result["bytes"] else ""
    say(f"{result['bundle']}: {size:.1f} MB{less}, {result['precision']}, step {result['step']} of {result['run']}")
    say(f"try it: python {result['bundle']}/predict.py --check")


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table, one per task.

    Each has the accuracy, that before rounding weights or leaving out experts, and how well graphs and run agree.
    """
    first = next(iter(result["tasks"].values()))
    header = ["task", "images", "val top-1 %", "95 % interval"]
    header += ["with all experts %"] if "whole" in first else []
    header += ["float32 %"] if "int8" in first else []
    table = [[*header, "equal predictions", "float32 difference", "allowed"]]
    for task, scores in result["tasks"].items():
        compared = scores.get("int8") or scores.get("whole") or scores["parity"]
        table.append(
            [
                task,
                str(scores["n"]),
                f"{scores['top1']:.1f}",
                f"{scores['top1_low']:.1f} - {scores['top1_high']:.1f}",
                *([f"{scores['whole']['top1']:.1f}"] if "whole" in scores else []),
                *([f"{scores['float32']['top1']:.1f}"] if "int8" in scores else []),
                f"{compared['equal']} of {scores['n']}",
                f"{scores['parity']['difference']:.1e}",
                f"{scores['parity']['tolerance']:.1e}",
            ]
        )
    return table
