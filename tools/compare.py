"""Set finished runs side by side, from their report.json files.

    python tools/compare.py runs/quickstart_last runs/quickstart --experts
    python tools/compare.py runs/*/ --markdown > table.md

Per task top-1 in percent with its 95 % interval (of the finite test set, not of the training), then the
mean over tasks, the images seen per task, training seconds, peak memory and forward GFLOPs an image.
A run goes by the name of its folder; runs whose folders have equal names go by their paths.
"""

import argparse
import sys
from pathlib import Path

from moe_bsr.config import ConfigError
from moe_bsr.runs import report
from moe_bsr.runtime.text_tables import as_markdown, as_text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table, intervals in every cell")
    parser.add_argument("--experts", action="store_true", help="also: share of the last run's experts by task")
    arguments = parser.parse_args(arguments)
    paths = list(map(Path, arguments.runs))
    names = [path.name for path in set(paths)]
    reports = {}
    for path in paths:
        name = path.name if path.name and names.count(path.name) == 1 else str(path)
        try:
            reports[name] = report.read(path)
        except ConfigError as error:
            print(f"compare.py: {error}", file=sys.stderr)
            return 2
        if reports[name] is None:
            print(f"compare.py: {path} has no report.json: not a finished run", file=sys.stderr)
            return 2
    rows = report.comparison(reports, intervals=arguments.markdown)
    print(as_markdown(rows) if arguments.markdown else as_text(rows))
    if arguments.experts:
        print(report.expert_use(reports[name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
