"""Train a linear probe: only the heads, to their optimum, in one pass over the images.

    moe-bsr probe configs/deit_tiny_moe_bsr.yaml plan.drop_blocks=[] data.root=data
    moe-bsr probe configs/deit_tiny_last.yaml data.root=data --blocks 6 7 8 9 10
    moe-bsr probe configs/deit_tiny_moe_bsr.yaml train.penalty=mild --run runs/start

Backbone, tasks and token dropping are those of CONFIG; plan.drop_blocks=[] keeps all tokens, which is more accurate and
slower. No block trains, no block has experts, and no image is augmented. The penalty on the weights is chosen on the
validation images.

Writes a run folder like any other, for `evaluate`, `predict`, `compare` and `views`.

Exit status: as of `moe-bsr train`. With --resume, a probe that was killed before it was saved starts again.
"""

import argparse

from moe_bsr.cli import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    train.add_arguments(parser, folder="runs/NAME_probe")
    help = "the heads also read the class tokens of these blocks (plan.head_blocks), which is more accurate"
    parser.add_argument("--blocks", type=int, nargs="+", metavar="N", help=help)


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import load
    from moe_bsr.config.probe import probe_config

    config = probe_config(load(arguments.config, arguments.overrides), arguments.blocks)
    return train.train(arguments, config, "probe", ending="_probe")
