"""Test the package against kills, damaged runs, broken configurations and hostile files.

    moe-bsr selftest                                                 # a few trials of each kind: a minute or two
    moe-bsr selftest --kills 200 --damage 500 --configs 2000 --hostile --json > results/selftest.json     # hours
    moe-bsr selftest --ranks 20 --json > results/selftest/ranks.json                                      # minutes

All random choices come from --seed. Each trial is a process of its own with limits on time and memory, in a temporary
folder. POSIX only.

Exit status: 0 no trial failed, 1 some failed, 2 invalid arguments.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moe_bsr.cli.run_arguments import at_least

PARTS = {
    "kills": "SIGKILL a training N times at random moments, and before every disk operation of a save. Resumed to its "
    "end, it must have the same bits as a run that was never killed",
    "ranks": "SIGKILL one of the two processes of a torchrun, in N runs. The run must end with a message. Resumed or "
    "restarted, it must have the same bits as an undisturbed run (Linux)",
    "damage": "damage or forge a run folder in N ways. It must be refused with a clear message, or give right results",
    "configs": "change configurations, task files and overrides in N ways. They must be refused with one line that "
    "names the key or the file, or train",
}
HOSTILE = (
    "try weights, images, packs and names made by an attacker. Nothing may be executed or written outside of the "
    "folder, and no command may hang"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, help in PARTS.items():
        parser.add_argument(f"--{name}", type=at_least(0), metavar="N", help=help)
    parser.add_argument("--hostile", action="store_true", help=HOSTILE)
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="seed of all choices (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from moe_bsr.cli.main import main
    from moe_bsr.runtime.provenance import commit
    from moe_bsr.selftest import configs, damage, hostile, kills, ranks

    torch.set_num_threads(1)
    asked = {name: getattr(arguments, name) for name in PARTS}
    asked["hostile"] = 10_000 if arguments.hostile else None
    if all(count is None for count in asked.values()):
        asked = {"kills": 3, "ranks": 2, "damage": 15, "configs": 40, "hostile": 15}
    parts: dict[str, Any] = {}
    campaigns = {"kills": kills, "ranks": ranks, "damage": damage, "configs": configs, "hostile": hostile}
    for name, part in campaigns.items():
        if not asked[name]:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="moe-bsr-selftest-") as folder:
            parts[name] = part.campaign(Path(folder).resolve(), asked[name], arguments.seed, main, _progress)
        parts[name]["seconds"] = round(time.monotonic() - began)
    failed = sum(part["failed"] for part in parts.values())
    if arguments.json:
        print(json.dumps({"failed": failed, "torch": str(torch.__version__), "commit": commit(), **parts}, indent=1))
    else:
        for name, part in parts.items():
            print(f"{name:<10}{part['tried']:6} tried{part['failed']:6} failed{part['seconds']:8} s")
    return int(failed > 0)


def _progress(line: str) -> None:
    print(line.encode("unicode_escape").decode(), file=sys.stderr, flush=True)
