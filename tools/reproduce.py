"""Rebuild the cost figures of the BSR paper's tables: published, ours, the difference, and why.

    python tools/reproduce.py                  # all tables
    python tools/reproduce.py 4 6 "Figure 1"
    python tools/reproduce.py --json
    python tools/reproduce.py --markdown > docs/paper_tables.md

Exit status 1 if a figure known to be reproducible is off by more than 0.3 %.
"""

import argparse
import json
import sys

from moe_bsr.paper import page
from moe_bsr.paper.rebuild import rebuild
from moe_bsr.paper.tables import FIGURES, TITLES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TITLES) + " (all)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--json", action="store_true", help="every figure as an object")
    kind.add_argument("--markdown", action="store_true", help="the page docs/paper_tables.md")
    arguments = parser.parse_args(arguments)
    unknown = [table for table in arguments.tables if table not in TITLES]
    if unknown:
        print(f"reproduce.py: no table {unknown[0]!r}; there are {', '.join(TITLES)}", file=sys.stderr)
        return 2
    results = [rebuild(f) for f in FIGURES if not arguments.tables or f.table in arguments.tables]
    if arguments.json:
        print(json.dumps([result.as_dict() for result in results], indent=1))
    else:
        print((page.as_markdown if arguments.markdown else page.as_text)(results))
    return int(any(result.off for result in results))


if __name__ == "__main__":
    sys.exit(main())
