"""Measure what each storage saves for the backward pass, how far its gradients are from the exact ones, and its time.

    moe-bsr gradients configs/deit_tiny_stl_bsr.yaml tasks=[pets] data.root=data
    moe-bsr gradients photos.yaml --storages int8 segments_int8 "{kind: back_razor, sparsity: 0.95}" --batch 32
    moe-bsr gradients photos.yaml runtime.precision=bf16 --json > gradients.json

A storage is the form in which a block saves activations for its backward pass. All are compared with `exact`, on one
batch of training images of the first task. The head is fitted to these images first; nothing else is trained, and
nothing is written.

Cosine, relative error and length are those of all gradients taken as one vector. A length of 0.6 means that gradients
are too short, so the learning rate may need a change. Time is that of a forward and a backward pass relative to
`exact`: the median over rounds in which all storages take turns.

Exit status: 0 done, 2 invalid arguments or input.
"""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from moe_bsr.cli import run_arguments
from moe_bsr.cli.terminal import say

if TYPE_CHECKING:
    from moe_bsr.benchmark.gradients import Row

COARSE = [f"{{kind: back_razor, sparsity: {sparsity}}}" for sparsity in (0.8, 0.9, 0.95)]
COARSE += ["{kind: back_razor, sparsity: 0.9, activations: int8}"]
COARSE += [f"{{kind: subspace, rank: {rank}}}" for rank in (0.5, 0.25, 0.125)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments.add_overrides(parser)
    help = "names, or mappings with kind and options (default: all, those of coarse gradients with several options)"
    parser.add_argument("--storages", nargs="+", metavar="STORAGE", help=help)
    help = "images in the batch (default: 16)"
    parser.add_argument("--batch", type=run_arguments.at_least(1), default=16, metavar="N", help=help)
    help = "rounds of timing (default: 5)"
    parser.add_argument("--rounds", type=run_arguments.at_least(1), default=5, metavar="N", help=help)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.benchmark import gradients
    from moe_bsr.config import load, replace
    from moe_bsr.model.storage import STORAGES
    from moe_bsr.runtime.device import prepare
    from moe_bsr.runtime.provenance import made_by

    file, overrides = arguments.config, arguments.overrides
    asked = arguments.storages or [*(name for name in STORAGES if not STORAGES[name].coarse), *COARSE]
    choices = [STORAGES.choose(load(file, [*overrides, f"storage={text}"]).storage) for text in ("exact", *asked)]
    config = replace(load(file, overrides), train__batch_size=arguments.batch, train__grad_accumulation_steps=1)
    config = replace(config, storage="exact")
    runtime = prepare(config.runtime)
    with runtime.in_effect():
        batch, model = gradients.prepare(config, runtime)
        say(f"{arguments.batch} images of {batch.task}, {runtime.precision}, {runtime.device}", error=True)
        rows = gradients.compare(config, runtime, model, batch, list(dict.fromkeys(choices)), arguments.rounds)
    if arguments.json:
        about = made_by(runtime) | {"task": batch.task, "batch": arguments.batch, "precision": runtime.precision}
        print(json.dumps(about | {"storages": [dataclasses.asdict(row) for row in rows]}, indent=1))
    else:
        say(table(rows))
    return 0


def table(rows: "list[Row]") -> str:
    from moe_bsr.runtime.text_tables import as_text

    cells = [["storage", "MiB kept an image", "cosine", "error", "length", "time"]]
    for row in rows:
        numbers = [f"{row.kept / 2**20:.3f}", f"{row.cosine:.4f}", f"{row.error:.4f}", f"{row.norm:.3f}"]
        cells.append([row.storage, *numbers, f"{row.seconds / rows[0].seconds:.2f}"])
    return as_text(cells)
