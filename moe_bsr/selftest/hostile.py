"""Put files made by an attacker, or damaged by accident, where images, weights, packs and names are read.

Each must be refused clearly, or read correctly. Nothing in it may be executed, nothing outside its folder written, no
control characters printed, and memory and time must stay bounded.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_bsr.selftest import hostile_archives, hostile_images, sandbox
from moe_bsr.selftest.hostile_parts import Case
from moe_bsr.selftest.injuries import CANARY
from moe_bsr.selftest.sandbox import Main

MEMORY_MB = 2500  # allowed peak of a command, libraries included


def campaign(
    folder: Path, count: int, seed: int, main: Main, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Try `count` cases in an order that depends on `seed`.

    Returns:
        Plain values: tried, failed, kinds {kind: tried}, and each failure in words.
    """
    cases = list(all_cases(random.Random(seed)))
    random.Random(seed).shuffle(cases)
    kinds: dict[str, int] = {}
    failures = []
    for name, prepare in cases[:count]:
        place = folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        canary = folder / "canary"
        canary.write_bytes(CANARY)
        arguments = prepare(place)
        kinds[name.split(":")[0]] = kinds.get(name.split(":")[0], 0) + 1
        if wrong := _try(place, canary, lambda arguments=arguments: main(arguments)):
            failures.append({"case": name, "wrong": wrong})
            progress(f"{name}: {wrong}")
    return {"tried": sum(kinds.values()), "seed": seed, "failed": len(failures), "kinds": kinds, "failures": failures}


def _try(place: Path, canary: Path, command: Callable[[], int]) -> str | None:
    before = sorted(path.name for path in canary.parent.iterdir())
    outcome = sandbox.run(command, folder=place, memory_mb=MEMORY_MB + 4000)
    if wrong := outcome.trouble:
        return wrong
    if canary.read_bytes() != CANARY or sorted(path.name for path in canary.parent.iterdir()) != before:
        return "wrote outside of its folder"
    if (place / "executed").exists():
        return "executed what was in the file"
    if outcome.peak_mb > MEMORY_MB:
        return f"took {outcome.peak_mb:.0f} MB"
    printed = outcome.stdout + outcome.stderr
    if bad := {c for c in printed if (ord(c) < 32 and c not in "\n\t\r") or ord(c) in (0x7F, 0x202E, 0x2066, 0x9B)}:
        return f"printed control letters {sorted(map(hex, map(ord, bad)))}"
    wrong = outcome.unclear() if outcome.refused else None
    return None if wrong == sandbox.SILENT and outcome.stdout.strip() else wrong  # `check` reports on stdout


def all_cases(rng: random.Random) -> Iterator[Case]:
    """Yield all cases."""
    yield from hostile_archives.weights(rng)
    yield from hostile_images.images(rng)
    yield from hostile_archives.packs(rng)
    yield from hostile_images.names()
    yield from hostile_images.places()
