"""Recompute the cost figures of the BSR paper's tables: published, ours, the difference, and its reason.

    moe-bsr reproduce                  # all tables
    moe-bsr reproduce 4 6 "Figure 1"
    moe-bsr reproduce --json
    moe-bsr reproduce --markdown > docs/paper_tables.md

Nothing is trained or measured: the figures follow from the paper's rules of counting.

Exit status: 0 done, 1 a figure known to be reproducible differs by more than 0.3 %, 2 no such table.
"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="such as 4 or 'Figure 1' (default: all)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--json", action="store_true", help="print a list of JSON objects, one per figure")
    kind.add_argument("--markdown", action="store_true", help="print the page docs/paper_tables.md")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import ConfigError
    from moe_bsr.paper import page, tables
    from moe_bsr.paper.rebuild import rebuild

    for table in arguments.tables:
        if table not in tables.TITLES:
            raise ConfigError(f"no table {table!r}; there are {', '.join(tables.TITLES)}")
    results = [rebuild(f) for f in tables.FIGURES if not arguments.tables or f.table in arguments.tables]
    if arguments.json:
        print(json.dumps([result.as_dict() for result in results], indent=1))
    else:
        print((page.as_markdown if arguments.markdown else page.as_text)(results))
    return int(any(result.off for result in results))
