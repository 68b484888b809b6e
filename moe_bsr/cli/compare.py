"""Compare finished runs in one table, from their report.json files.

    moe-bsr compare runs/quickstart_last runs/quickstart --experts
    moe-bsr compare runs/*/ --markdown > table.md

Columns: top-1 accuracy of each task in percent, the mean over tasks, images seen per task, training seconds, peak
memory, and GFLOPs of a forward pass per image. --markdown adds 95 % intervals, which account for the finite test set
and not for the randomness of training. Accuracies are those of the report: on the test split, or else on the split
that stands after the run's name.

For more than 12 tasks the table has mean and spread over tasks, and a second one lists the tasks on which the last run
is worse and better than the first. --json has all tasks. A run is named by its folder, or by its path if two folders
have the same name. The zip file of a shared run is accepted too.

Exit status: 0 done, 2 a run has no valid report.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from moe_bsr.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or zip file of a shared run")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table, with intervals in its cells")
    form.add_argument("--json", action="store_true", help="print the reports by run, as one JSON object")
    parser.add_argument("--experts", action="store_true", help="also print how often the last run's tasks use experts")


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
    """Return the reports by run name: that of the folder, or the path if two folders have the same name.

    Raises:
        ConfigError: a report is missing, cut or damaged.
    """
    from moe_bsr.config import ConfigError
    from moe_bsr.runs import archive, report

    folder_names = [path.name for path in set(paths)]
    reports = {}
    for path in paths:
        name = path.name if path.name and folder_names.count(path.name) == 1 else str(path)
        with archive.opened(path) as folder:
            reports[name] = report.read(folder)
        if reports[name] is None:
            raise ConfigError(f"{path} has no report.json: not a finished run")
    return reports
