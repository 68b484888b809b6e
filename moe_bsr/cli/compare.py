"""Set finished runs side by side, from their report.json files.

    moe-bsr compare runs/quickstart_last runs/quickstart --experts
    moe-bsr compare runs/*/ --markdown > table.md

Per task top-1 in percent with its 95 % interval (of the finite test set, not of the training), then the
mean over tasks, the images seen per task, training seconds, peak memory and forward GFLOPs an image.
Of more than 12 tasks: their mean and spread, and those of which the last run does worse and better than the first one;
--json has all.
A run goes by the name of its folder; runs whose folders have equal names go by their paths.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="a Markdown table, intervals in every cell")
    form.add_argument("--json", action="store_true", help="the reports by name, as one JSON object")
    parser.add_argument("--experts", action="store_true", help="also: share of the last run's experts by task")


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.runs import comparison
    from moe_bsr.runtime.text_tables import as_markdown, as_text

    reports = read_reports(arguments.runs)
    if arguments.json:
        print(json.dumps(reports, indent=1))
        return 0
    rows = comparison.comparison(reports, intervals=arguments.markdown)
    tables = [rows for rows in (rows, comparison.most_changed(reports)) if rows]
    say("\n\n".join(map(as_markdown if arguments.markdown else as_text, tables)))
    if arguments.experts:
        say(comparison.expert_use(list(reports.values())[-1]))
    return 0


def read_reports(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """The reports by the name of their run: its folder's, or its path where two folders have one name.

    Raises:
        ConfigError: a report that is missing, cut or damaged.
    """
    from moe_bsr.config import ConfigError
    from moe_bsr.runs import report

    folder_names = [path.name for path in set(paths)]
    reports = {}
    for path in paths:
        name = path.name if path.name and folder_names.count(path.name) == 1 else str(path)
        reports[name] = report.read(path)
        if reports[name] is None:
            raise ConfigError(f"{path} has no report.json: not a finished run")
    return reports
