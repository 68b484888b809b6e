"""Write results/README.md anew from the reports in results/.

    moe-bsr results [FOLDER]

The tables there are never typed: every figure comes from a file beside them.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), metavar="FOLDER", help="(results)")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.runs import results

    print(f"written: {results.write_readme(arguments.folder)}")
    return 0
