"""Attack the product as bad days and strangers would: kills, damaged runs, mutated configurations, hostile files.

    moe-bsr selftest                                                     a minute or two
    moe-bsr selftest --kills 200 --damage 500 --configs 2000 --hostile --json > results/selftest.json      hours
    moe-bsr selftest --ranks 20 --json > results/selftest/ranks.json                                       minutes

--kills N      SIGKILL a training at N random moments and before every disk operation of a save; each resume has to end
               with the bits of the run that was never killed
--ranks N      SIGKILL one of two processes that torchrun started, in N runs; each has to end with a word, and
               resumed or started again with the bits of the run that nobody disturbed (Linux)
--damage N     damage or forge a run folder in N ways; each is refused in clear words, or right
--configs N    change configurations, task files and overrides in N ways; each is refused in a line that names the key
               or the file, or trains
--hostile      weights, images, packs and names that somebody hostile made; nothing is executed, written outside or left
               hanging

Everything is drawn from --seed. Each trial is a process of its own with limits on time and memory. POSIX only.

Exit status: 0 nothing failed, 1 something did.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moe_bsr.cli.run_arguments import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    counted = {"kills": "kills", "ranks": "kills of one process among two", "damage": "damages"}
    for name, what in (counted | {"configs": "configurations"}).items():
        help = f"so many {what} (a few, if no part is named)"
        parser.add_argument(f"--{name}", type=at_least(0), metavar="N", help=help)
    parser.add_argument("--hostile", action="store_true", help="all hostile files (a few, if no part is named)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of all that is drawn (0)")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of the table")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from moe_bsr.cli.main import main
    from moe_bsr.runtime.provenance import commit
    from moe_bsr.selftest import configs, damage, hostile, kills, ranks

    torch.set_num_threads(1)
    asked = {name: getattr(arguments, name) for name in ("kills", "ranks", "damage", "configs")}
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
