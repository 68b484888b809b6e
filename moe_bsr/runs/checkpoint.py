"""Checkpoints that survive anything: written whole or not at all, verified before use, no pickles.

A checkpoint is a folder `checkpoint/<step>/` of safetensors files, `state.json` and, last, a
`manifest.json` with the sha256 of each. It is written as `<step>.tmp`, every file and folder synced to
disk, then renamed: a crash at any moment leaves the old checkpoints and at most a `.tmp` to sweep away.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_bsr.runtime import files

KEPT = 2  # the newest checkpoints kept, beside the best one


class CheckpointError(RuntimeError):
    """No usable checkpoint, or one that does not fit; the message names the file."""


def save(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write `checkpoint/<step>/` and drop what is no longer kept.

    Args:
        tensors: one safetensors file for each name.
        state: goes to state.json; its "best_step" names a checkpoint to keep whatever its age.
    """
    folder = run / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / str(step), folder / f"{step}.tmp"
    for stale in folder.glob("*.tmp"):
        shutil.rmtree(stale)
    temporary.mkdir()
    for name, group in tensors.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    parts = sorted(temporary.iterdir())
    for part in parts:
        files.sync(part)
    manifest = temporary / "manifest.json"
    manifest.write_text(json.dumps({"step": step, "sha256": {f.name: _sha256(f) for f in parts}}, indent=1))
    files.sync(manifest)
    files.sync(temporary)
    before = folder / f"{step}.before.tmp"
    if final.exists():  # a resumed run comes by here again; until the rename below, `recover` finds this one
        final.rename(before)
    temporary.rename(final)
    files.sync(folder)
    if before.exists():
        shutil.rmtree(before)
    newest = steps(run)[-KEPT:]
    # A kept checkpoint's best one is kept too: a resume from the older of the two must still find it.
    kept = set(newest) | {best_step(folder / str(step)) for step in newest}
    for old in steps(run):
        if old not in kept:
            shutil.rmtree(folder / str(old))
    return final


def recover(run: Path) -> None:
    """Finish a save that ended between its two renames. Only for whoever will write here next."""
    for temporary in sorted((run / "checkpoint").glob("*.tmp"), key=lambda path: len(path.name)):  # the newer first
        final = temporary.with_name(temporary.name.split(".")[0])
        if not final.exists() and damage(temporary) is None:
            temporary.rename(final)


def best_step(folder: Path) -> int | None:
    """The best step known when this checkpoint was written."""
    try:
        return json.loads((folder / "state.json").read_text())["best_step"]
    except (OSError, ValueError, KeyError):
        return None


def steps(run: Path) -> list[int]:
    """Steps of the checkpoints present, ascending."""
    return sorted(int(p.name) for p in (run / "checkpoint").glob("*") if p.name.isdecimal())


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in dict.fromkeys(("weights.safetensors", "state.json", *manifest["sha256"])):
            if _sha256(folder / name) != manifest["sha256"][name]:
                return f"{folder / name} does not match its hash in manifest.json"
    except OSError as error:
        return f"{error.filename} is missing or unreadable"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / 'manifest.json'} is unreadable ({error})"
    return None


def latest(run: Path, warn: Callable[[str], None] = warnings.warn) -> Path:
    """The newest sound checkpoint; damaged ones are named through `warn` and passed over.

    Its hashes have been compared: `read(folder, verified=True)` does not compare them again.

    Raises:
        CheckpointError: there is none.
    """
    for step in reversed(steps(run)):
        folder = run / "checkpoint" / str(step)
        wrong = damage(folder)
        if wrong is None:
            return folder
        warn(f"checkpoint refused: {wrong}; looking for one before it")
    raise CheckpointError(f"no usable checkpoint in {run / 'checkpoint'}; begin in a new run folder")


def read(folder: Path, verified: bool = False) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """All tensors by file name, and the state, of a checkpoint.

    Args:
        verified: its hashes have just been compared (`latest` does); otherwise they are compared here.
    Raises:
        CheckpointError: missing or damaged.
    """
    if not verified and (wrong := damage(folder)) is not None:
        raise CheckpointError(f"checkpoint refused: {wrong}")
    tensors = {file.stem: load_file(file) for file in folder.glob("*.safetensors")}
    return tensors, json.loads((folder / "state.json").read_text())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
