"""Damage and forge run folders, then evaluate and resume them. Each must be refused clearly, or give right results.

Right results are: a resumed run ends with the bits of the run that was never damaged, and an evaluation gives the
numbers of one of its sound checkpoints. Nothing outside the run folder may change, and no command may hang.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_bsr.selftest import sandbox, tiny
from moe_bsr.selftest.injuries import CANARY, KINDS, remove, steps
from moe_bsr.selftest.sandbox import Main

MOST_BYTES = 2**26  # a larger file is not one of the tiny run


def campaign(
    folder: Path, count: int, seed: int, main: Main, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Damage `count` copies of a run, and evaluate and resume each.

    Returns:
        Plain values: tried, failed, kinds {kind: {tried, refused, right}}, and each failure in words.
    """
    _, file = tiny.write_config(folder, train__pictures=False)
    whole, sound = folder / "whole", folder / "sound"
    for run, last in ((whole, tiny.STEPS), (sound, 6)):
        _must(sandbox.run(_train_until(main, file, run, last), seconds=300))
    expected = _bits(whole)
    scores = {step: _scores(main, sound, step) for step in steps(sound)}
    scores |= {step: _scores(main, whole, step) for step in steps(whole) if step not in scores}  # the same bits
    allowed = {json.dumps(value, sort_keys=True) for value in scores.values()}
    rng, kinds, failures = random.Random(seed), {}, []
    for number in range(count):
        kind = rng.choice(list(KINDS))
        run, canary = folder / "run", folder / "canary"
        canary.write_bytes(CANARY)
        shutil.copytree(sound, run, symlinks=True)
        try:
            what = KINDS[kind](run, canary, rng)
            found = kinds.setdefault(kind, {"tried": 0, "refused": 0, "right": 0})
            found["tried"] += 1
            wrong = _try(main, file, run, expected, allowed, found)
            if canary.read_bytes() != CANARY:
                wrong = "wrote outside of the run folder"
        finally:
            remove(run)
        if wrong is not None:
            failures.append({"number": number, "kind": kind, "what": what, "wrong": wrong})
            progress(f"{number} {kind}, {what}: {wrong}")
    return {"tried": count, "seed": seed, "failed": len(failures), "kinds": kinds, "failures": failures}


def _try(
    main: Main, file: Path, run: Path, expected: dict[str, bytes], allowed: set[str], found: dict[str, int]
) -> str | None:
    """Return what went wrong with a damaged run, or None. Count in `found` whether its resumption was refused."""
    evaluation = sandbox.run(lambda: main(["evaluate", str(run), "--json"]))
    if wrong := evaluation.trouble:
        return f"evaluate: {wrong}"
    if evaluation.refused:
        if wrong := evaluation.unclear():
            return f"evaluate: {wrong}"
    else:
        try:
            value = _numbers(json.loads(evaluation.stdout))
        except ValueError:
            return f"evaluate: no JSON on stdout but {evaluation.stdout[:80]!r}"
        if json.dumps(value, sort_keys=True) not in allowed:
            return "evaluate: the numbers are not those of a sound checkpoint"
    resumed = sandbox.run(lambda: main(["train", str(file), "--run", str(run), "--resume"]), seconds=120)
    if wrong := resumed.trouble:
        return f"resume: {wrong}"
    if resumed.refused:
        found["refused"] += 1
        wrong = resumed.unclear()
        return wrong and f"resume: {wrong}"
    found["right"] += 1
    try:
        differing = [name for name, value in expected.items() if _bits(run).get(name) != value]
    except (OSError, ValueError) as error:
        return f"resume: finished without its files ({error})"
    if differing == ["metrics.jsonl"] and "metrics.jsonl" in resumed.stdout + resumed.stderr:
        return None  # lines of it were lost, and the command said so
    return f"resume: other bits in {', '.join(differing)}" if differing else None


def _train_until(main: Main, file: Path, run: Path, last: int) -> Callable[[], int]:
    """Return a command that trains. If `last` is not the final update, it stops after `last`, as by a signal."""

    def command() -> int:
        from moe_bsr.training.trainer import Trainer

        update = Trainer._update

        def counted(self: Trainer, *arguments: Any) -> None:
            update(self, *arguments)
            if self.state.step == last < tiny.STEPS:
                self.stop.number = 15

        Trainer._update = counted
        status = main(["train", str(file), "--run", str(run)])
        return 0 if status in (0, 128 + 15) else status

    return command


def _must(outcome: sandbox.Outcome) -> None:
    if outcome.status != 0:
        raise RuntimeError(f"the run to be damaged could not be made: {outcome.stderr[-500:]}")


def _bits(run: Path) -> dict[str, bytes]:
    last = run / "checkpoint" / str(tiny.STEPS)
    files = [*last.glob("*.safetensors"), run / "metrics.jsonl"]
    if odd := [file.name for file in files if file.is_symlink() or not file.is_file()]:
        raise ValueError(f"{odd[0]} is not a file")  # reading a link to /dev/zero would never end
    if grown := [file.name for file in files if file.stat().st_size > MOST_BYTES]:
        raise ValueError(f"{grown[0]} has grown beyond {MOST_BYTES / 2**20:.0f} MiB")
    return {file.name: file.read_bytes() for file in files}


def _scores(main: Main, run: Path, step: int) -> dict[str, Any]:
    found = sandbox.run(lambda: main(["evaluate", str(run), "--checkpoint", str(step), "--json"]))
    _must(found)
    return _numbers(json.loads(found.stdout))


def _numbers(report: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a report that are the same in each evaluation of the same weights."""
    return {task: [scores[key] for key in ("top1", "loss", "ece", "n")] for task, scores in report["tasks"].items()}
