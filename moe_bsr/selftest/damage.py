"""Damage and forge run folders, then resume and evaluate them: each is refused in clear words, or right.

Right means: a resumed run ends with the bits of the run that was never damaged, an evaluation gives the numbers of one
of its sound checkpoints. Nothing outside the run folder may change, and nothing may hang.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from moe_bsr.selftest import sandbox, tiny
from moe_bsr.selftest.sandbox import Main

CANARY = b"nobody may write here\n"


def campaign(
    folder: Path, count: int, seed: int, main: Main, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Try `count` damages; returns plain values: tried, by kind {tried, refused, right}, and each failure in words."""
    _, file = tiny.write_config(folder, train__pictures=False)
    whole, sound = folder / "whole", folder / "sound"
    for run, last in ((whole, tiny.STEPS), (sound, 6)):
        _must(sandbox.run(_train_until(main, file, run, last), seconds=300))
    expected = _bits(whole)
    scores = {step: _scores(main, sound, step) for step in _steps(sound)}
    scores |= {step: _scores(main, whole, step) for step in _steps(whole)}
    allowed = {json.dumps(value, sort_keys=True) for value in scores.values()}
    chance, kinds, failures = random.Random(seed), {}, []
    for number in range(count):
        kind = chance.choice(list(KINDS))
        run, canary = folder / "run", folder / "canary"
        canary.write_bytes(CANARY)
        shutil.copytree(sound, run, symlinks=True)
        try:
            what = KINDS[kind](run, canary, chance)
            found = kinds.setdefault(kind, {"tried": 0, "refused": 0, "right": 0})
            found["tried"] += 1
            wrong = _try(main, file, run, expected, allowed, found)
            if canary.read_bytes() != CANARY:
                wrong = "wrote outside of the run folder"
        finally:
            _remove(run)
        if wrong is not None:
            failures.append({"number": number, "kind": kind, "what": what, "wrong": wrong})
            progress(f"{number} {kind}, {what}: {wrong}")
    return {"tried": count, "seed": seed, "failed": len(failures), "kinds": kinds, "failures": failures}


def _try(
    main: Main, file: Path, run: Path, expected: dict[str, bytes], allowed: set[str], found: dict[str, int]
) -> str | None:
    """What went wrong with a damaged run, or None."""
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
            return "evaluate: numbers of no sound checkpoint"
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
        return None  # lines that were lost, and it said so
    return f"resume: other bits in {', '.join(differing)}" if differing else None


# --- what is done to a run ---


def _checkpoint(run: Path, chance: random.Random) -> Path:
    """The newest checkpoint mostly, or one before it."""
    steps = _steps(run)
    return run / "checkpoint" / str(steps[-1] if chance.random() < 0.7 else chance.choice(steps))


def _file(run: Path, chance: random.Random) -> Path:
    files = sorted(path for path in _checkpoint(run, chance).iterdir() if path.is_file())
    return chance.choice([*files, *files, run / "config.yaml", run / "metrics.jsonl"])


def _change_bytes(run: Path, canary: Path, chance: random.Random) -> str:
    file = _file(run, chance)
    data = bytearray(file.read_bytes())
    how = chance.choice(["truncated", "a bit flipped", "emptied", "grown", "zeroed", "half of it random"])
    at = chance.randrange(max(1, len(data)))
    if how == "truncated":
        data = data[:at]
    elif how == "a bit flipped" and data:
        data[at] ^= 1 << chance.randrange(8)
    elif how == "emptied":
        data = bytearray()
    elif how == "grown":
        data += chance.randbytes(chance.choice([1, 4096]))
    elif how == "zeroed":
        data = bytearray(len(data))
    else:
        data[at:] = chance.randbytes(len(data) - at)
    file.write_bytes(data)
    return f"{file.relative_to(run)} {how}"


def _replace_file(run: Path, canary: Path, chance: random.Random) -> str:
    file = _file(run, chance)
    how = chance.choice(
        ["gone", "a folder", "a FIFO", "a link out", "a broken link", "a device", "no permission", "itself"]
    )
    if how == "no permission":
        file.chmod(0)
        return f"{file.relative_to(run)} has no permission"
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how == "a FIFO":
        os.mkfifo(file)
    elif how == "a link out":
        file.symlink_to(canary)
    elif how == "a broken link":
        file.symlink_to(run / "nowhere")
    elif how == "a device":
        file.symlink_to("/dev/zero")
    elif how == "itself":
        file.symlink_to(file.name)
    return f"{file.relative_to(run)} is {how}"


def _link_out(run: Path, canary: Path, chance: random.Random) -> str:
    """What a run writes, as a link to a file of somebody else's."""
    name = chance.choice(
        ["config.yaml.tmp", "report.json", "report.json.tmp", "report.md", "report.md.tmp", "test_evaluations.log",
         "metrics.jsonl", "checkpoint", "checkpoint/9.tmp", "checkpoint/9", "tensorboard", "lock", "images"]
    )  # fmt: skip
    path = run / name
    outside = canary.parent / "outside"
    _remove(path)
    _remove(outside)
    if name in ("checkpoint", "checkpoint/9.tmp", "checkpoint/9", "tensorboard", "images"):
        outside.mkdir()
        (outside / "9.tmp").mkdir()
        (outside / "9.tmp" / "kept").hardlink_to(canary)
        path.symlink_to(outside)
    else:
        path.symlink_to(canary)
    return f"{name} is a link out"


def _strange_names(run: Path, canary: Path, chance: random.Random) -> str:
    name = chance.choice(
        ["notes.tmp", "7.tmp", "seven", "007", "-1", "9" * 30, "6.before.tmp", "٣", ".tmp", "5 ", "1e3", "6.tmp.tmp"]
    )
    path = run / "checkpoint" / name
    how = chance.choice(["a file", "an empty folder", "a copy", "a link"])
    if path.exists():
        return f"{name} was there"
    if how == "a file":
        path.write_text("x")
    elif how == "an empty folder":
        path.mkdir()
    elif how == "a copy":
        shutil.copytree(run / "checkpoint" / str(_steps(run)[-1]), path)
    else:
        path.symlink_to(canary)
    return f"checkpoint/{name!r} is {how}"


def _unlisted(run: Path, canary: Path, chance: random.Random) -> str:
    """A file that the manifest does not list, or no longer lists."""
    folder = _checkpoint(run, chance)
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = sorted(manifest["sha256"])
    if chance.random() < 0.5:
        name = chance.choice(listed)
        del manifest["sha256"][name]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        tensors = folder / name
        if tensors.suffix == ".safetensors" and chance.random() < 0.7:
            save_file({key: value + 1 for key, value in load_file(tensors).items()}, tensors)
        return f"{name} is no longer listed"
    name = chance.choice(["average.safetensors", "other.safetensors", "x.safetensors", "weights2.safetensors"])
    if name in listed:
        return f"{name} is listed"
    save_file({key: value + 7 for key, value in load_file(folder / "weights.safetensors").items()}, folder / name)
    return f"{name} is not listed"


def _forged(run: Path, canary: Path, chance: random.Random) -> str:
    """Something else in a file, and a manifest whose hashes fit."""
    folder = _checkpoint(run, chance)
    kind = chance.choice(["state", "tensors", "manifest"])
    what = {"state": _forge_state, "tensors": _forge_tensors, "manifest": _forge_manifest}[kind](folder, chance)
    return f"{folder.name}: {what}"


def _forge_state(folder: Path, chance: random.Random) -> str:
    file = folder / "state.json"
    state = json.loads(file.read_text())
    value = chance.choice([None, [], {}, "x", -1, 1.5, True, "../../elsewhere", 10**30, [[]]])
    if chance.random() < 0.2:
        state, key = value, "all of it"
    else:
        key = chance.choice(sorted(set(state) - {"seconds"}))
        if chance.random() < 0.3:
            del state[key]
            value = "gone"
        elif state[key] == value:
            value = state[key] = "x"
        else:
            state[key] = value
    file.write_text(json.dumps(state))
    _fit_hashes(folder)
    return f"state.json, {key} is {value!r}"


def _forge_tensors(folder: Path, chance: random.Random) -> str:
    file = folder / chance.choice(["weights.safetensors", "optimizer.safetensors", "average.safetensors"])
    tensors = load_file(file)
    name = chance.choice(sorted(tensors))
    how = chance.choice(
        ["gone", "renamed", "another shape", "flat", "integers", "NaN", "infinite", "one more", "empty", "none at all"]
    )
    value = tensors[name]
    if how in ("gone", "renamed"):
        del tensors[name]
    if how == "renamed":
        tensors["x." + name] = value
    elif how == "another shape":
        tensors[name] = torch.zeros(*value.shape, 2)
    elif how == "flat":
        tensors[name] = torch.zeros(value.numel() + 1)
    elif how == "integers":
        tensors[name] = torch.zeros(value.shape, dtype=torch.int8)
    elif how in ("NaN", "infinite"):
        tensors[name] = torch.full(value.shape, float(how.replace("infinite", "inf")))
    elif how == "one more":
        tensors["blocks.99.weight"] = torch.zeros(3)
    elif how == "empty":
        tensors[name] = torch.zeros(0)
    elif how == "none at all":
        tensors = {}
    save_file(tensors, file)
    _fit_hashes(folder)
    return f"{file.name}, {name} {how}"


def _forge_manifest(folder: Path, chance: random.Random) -> str:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    how = chance.choice(["step", "path", "absolute path", "device", "list", "no hashes", "number", "hash of nothing"])
    if how == "step":
        manifest["step"] = 1
    elif how in ("path", "absolute path", "device"):
        name = {"path": "../../../canary", "absolute path": str(folder.parents[2] / "canary"), "device": "/dev/zero"}[
            how
        ]
        manifest["sha256"][name] = hashlib.sha256(CANARY).hexdigest()
    elif how == "list":
        manifest = [manifest]
    elif how == "no hashes":
        manifest["sha256"] = {}
    elif how == "number":
        manifest["sha256"] = 7
    else:
        manifest["sha256"]["state.json"] = None
    file.write_text(json.dumps(manifest))
    return f"manifest.json, {how}"


def _forged_config(run: Path, canary: Path, chance: random.Random) -> str:
    """A value of config.yaml is another one, gone, or of another kind."""
    file = run / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    places = list(_places(tree))
    owner, key = chance.choice(places)
    name, old = key, owner[key]
    if chance.random() < 0.4:
        del owner[key]
        value: Any = "gone"
    else:
        value = chance.choice([None, [], {}, "x", "../../x", -1, 0, 10**20, 1e400, True, [[1]], {"a": 1}])
        if value == old:
            value = "y"
        owner[key] = value
    file.write_text(yaml.safe_dump(tree))
    return f"config.yaml, {name} is {value!r}"


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _several(run: Path, canary: Path, chance: random.Random) -> str:
    return "; ".join(KINDS[chance.choice(list(KINDS)[:-1])](run, canary, chance) for _ in range(2))


KINDS: dict[str, Callable[[Path, Path, random.Random], str]] = {
    "bytes": _change_bytes,
    "kind of file": _replace_file,
    "link out": _link_out,
    "strange names": _strange_names,
    "unlisted": _unlisted,
    "forged": _forged,
    "configuration": _forged_config,
    "several": _several,
}


# --- what is compared ---


def _train_until(main: Main, file: Path, run: Path, last: int) -> Callable[[], int]:
    """Train in the sandbox; before the end, stop as a signal would after update `last`."""

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
        raise RuntimeError(f"the run that is to be damaged could not be made: {outcome.stderr[-500:]}")


def _steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoint").iterdir() if path.name.isdecimal())


def _bits(run: Path) -> dict[str, bytes]:
    last = run / "checkpoint" / str(tiny.STEPS)
    return {file.name: file.read_bytes() for file in [*last.glob("*.safetensors"), run / "metrics.jsonl"]}


def _scores(main: Main, run: Path, step: int) -> dict[str, Any]:
    found = sandbox.run(lambda: main(["evaluate", str(run), "--checkpoint", str(step), "--json"]))
    _must(found)
    return _numbers(json.loads(found.stdout))


def _numbers(report: dict[str, Any]) -> dict[str, Any]:
    """What the same weights score, every time."""
    return {task: [scores[key] for key in ("top1", "loss", "ece", "n")] for task, scores in report["tasks"].items()}


def _fit_hashes(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["sha256"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            for inner in path.rglob("*"):
                with contextlib.suppress(OSError):
                    inner.chmod(0o700)
            shutil.rmtree(path, ignore_errors=True)
