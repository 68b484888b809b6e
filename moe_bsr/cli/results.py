"""Write results/README.md from the reports in results/.

    moe-bsr results [FOLDER]

Every number in its tables comes from a file in that folder; none is typed by hand.

Exit status: 0 written, 2 a report cannot be read.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "folder of the reports (default: results)"
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), metavar="FOLDER", help=help)


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.runs import results

    print(f"written: {results.write_readme(arguments.folder)}")
    return 0
