"""Checkpoints that survive anything: written whole or not at all, verified before use, no pickles.

A checkpoint is a folder `checkpoint/<step>/` of safetensors files, `state.json` and, last, a
`manifest.json` with the sha256 of each. It is written as `<step>.tmp`, every file and folder synced to
disk, then renamed: a crash at any moment leaves the old checkpoints and at most a `.tmp` to sweep away.
Only what the manifest lists is read. Other names in these folders are nobody's and left alone.
"""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_bsr.config import ConfigError
from moe_bsr.runtime import files

KEPT = 2  # the newest checkpoints kept, beside the best one
STATE, MANIFEST = "state.json", "manifest.json"
LISTED = re.compile(r"state\.json|\w+\.safetensors", re.ASCII)
UNFINISHED = re.compile(r"(\d+)(\.before)?\.tmp", re.ASCII)


class CheckpointError(RuntimeError):
    """No usable checkpoint, or one that does not fit; the message names the file."""


def save(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write `checkpoint/<step>/` and drop what is no longer kept.

    Args:
        tensors: one safetensors file for each name.
        state: goes to state.json; its "best_step" names a checkpoint to keep whatever its age.
    Raises:
        OSError: it could not be written; the message names the folder, the size and what helps.
    """

    def write(temporary: Path, mode: int) -> dict[str, str]:
        hashes = {}
        for name, group in tensors.items():
            file = temporary / f"{name}.safetensors"
            _save_tensors({k: v.detach().cpu().contiguous() for k, v in group.items()}, file)
            file.chmod(mode)  # safetensors makes files that only their owner reads
            files.sync(file)
            hashes[file.name] = sha256_of(file)
        return hashes

    size = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    return _replace(run, step, state, write, size)


def save_state(run: Path, step: int, state: dict[str, Any]) -> Path:
    """Give the checkpoint of this step another state; its tensors are still those of the run, and not copied.

    Raises:
        OSError: as `save` does.
    """
    before = run / "checkpoint" / str(step)

    def write(temporary: Path, mode: int) -> dict[str, str]:
        hashes = {name: digest for name, digest in _hashes(before).items() if name != STATE}
        for name in hashes:
            try:
                os.link(before / name, temporary / name, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copyfile(before / name, temporary / name, follow_symlinks=False)
            files.sync(temporary / name)
        return hashes

    return _replace(run, step, state, write, 0)


def _replace(
    run: Path, step: int, state: dict[str, Any], write: Callable[[Path, int], dict[str, str]], size: int
) -> Path:
    folder = run / "checkpoint"
    final, temporary, before = (folder / f"{step}{ending}" for ending in ("", ".tmp", ".before.tmp"))
    try:
        files.require(folder, "a folder")
        folder.mkdir(parents=True, exist_ok=True)
        for stale in _unfinished(folder):
            files.remove(stale)
        temporary.mkdir()
        files.write_new(temporary / STATE, json.dumps(state, indent=1))
        hashes = write(temporary, (temporary / STATE).stat().st_mode & 0o777)
        hashes = dict(sorted((hashes | {STATE: sha256_of(temporary / STATE)}).items()))
        files.write_new(temporary / MANIFEST, json.dumps({"step": step, "sha256": hashes}, indent=1))
        files.sync(temporary)
        if files.kind(final):  # a resumed run comes by here again; until the next rename `recover` finds this one
            final.rename(before)
        temporary.rename(final)
        files.sync(folder)
    except OSError as error:
        _discard(temporary)
        needs = f" (it needs {size / 2**20:.1f} MB)" if size else ""
        raise OSError(f"no checkpoint could be written in {folder}{needs}: {files.reason(error)}") from error
    _sweep(run, before)
    return final


def _discard(temporary: Path) -> None:
    """What was half-written, so that its room is free again."""
    if files.kind(temporary) == "a folder":
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(run: Path, before: Path) -> None:
    """Delete what is no longer kept. What cannot be deleted is in nobody's way."""
    folder = run / "checkpoint"
    newest = steps(run)[-KEPT:]
    # A kept checkpoint's best one is kept too: a resume from the older of the two must still find it.
    kept = set(newest) | {best_step(folder / str(step)) for step in newest}
    for old in [before, *(folder / str(step) for step in steps(run) if step not in kept)]:
        try:
            files.remove(old)
        except OSError as error:
            warnings.warn(f"{old} could not be deleted ({error}); it is of no more use", stacklevel=4)


def check_room(run: Path, sizes: dict[str, int], count: int) -> None:
    """Refuse to begin where so many checkpoints cannot be written.

    Args:
        sizes: bytes of each file of a checkpoint, by name.
    Raises:
        ConfigError: with the MB needed and those free.
    """
    needed, free = count * sum(sizes.values()), shutil.disk_usage(run).free
    if needed > free:
        raise ConfigError(
            f"{run}: no room for the run's checkpoints: {count} of {sum(sizes.values()) / 2**20:.1f} MB each need "
            f"{needed / 2**20:.1f} MB, {free / 2**20:.1f} MB are free; make room there, or name another folder"
        )
    name, limit = max(sizes, key=lambda each: sizes[each]), resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and sizes[name] > limit:
        raise ConfigError(
            f"{run}: a checkpoint's {name}.safetensors needs {sizes[name] / 2**20:.1f} MB, and a file may have "
            f"{limit / 2**20:.1f} MB; raise the limit of a file's size (ulimit -f)"
        )


def recover(run: Path) -> None:
    """Finish a save that ended between its two renames. Only for whoever will write here next.

    Raises:
        CheckpointError: something else has the name of the folder of checkpoints.
    """
    for temporary in sorted(_unfinished(_folder(run)), key=lambda path: len(path.name)):  # the newer first
        final = temporary.with_name(temporary.name.split(".")[0])
        if files.kind(final) is None and damage(temporary) is None:
            temporary.rename(final)


def _unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.tmp") if UNFINISHED.fullmatch(path.name)]


def best_step(folder: Path) -> int | None:
    """The best step known when this checkpoint was written."""
    best = _peek(folder, "best_step")
    return best if type(best) is int else None


def unreadable_images(run: Path, task: str) -> set[str]:
    """The names of the images of a task that the run could not read so far, as its newest checkpoint has them."""
    newest = steps(run)[-1:]
    met = _peek(run / "checkpoint" / str(newest[0]), "skipped") if newest else None
    splits = met.get(task) if isinstance(met, dict) else None
    return {name for names in splits.values() for name in names} if isinstance(splits, dict) else set()


def _peek(folder: Path, key: str) -> Any:
    """A value of a checkpoint's state, not verified; None if there is none."""
    try:
        return json.loads(files.read_text(folder / STATE))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def steps(run: Path) -> list[int]:
    """Steps of the checkpoints present, ascending.

    Raises:
        CheckpointError: something else has the name of the folder of checkpoints.
    """
    return [int(folder.name) for folder in _numbered(run) if files.kind(folder) == "a folder"]


def _numbered(run: Path) -> list[Path]:
    """Whatever is named as a checkpoint is, by ascending step."""
    found = [path for path in _folder(run).glob("*") if re.fullmatch(r"0|[1-9][0-9]{0,17}", path.name)]
    return sorted(found, key=lambda path: int(path.name))


def _folder(run: Path) -> Path:
    folder = run / "checkpoint"
    try:
        files.require(folder, "a folder")
    except files.NotOrdinary as error:
        raise CheckpointError(str(error)) from None
    return folder


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files.require(folder, "a folder")
        hashes = _hashes(folder)
        for name in dict.fromkeys(("weights.safetensors", STATE, *hashes)):
            if sha256_of(folder / name) != hashes.get(name):
                return f"{folder / name} does not match its hash in {MANIFEST}"
        for file in sorted(folder.iterdir()):
            if file.suffix == ".safetensors" and file.name not in hashes:
                return f"{file} is not listed in {MANIFEST}"
    except files.NotOrdinary as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} is missing or unreadable"
    except ValueError as error:
        return str(error)
    return None


def _hashes(folder: Path) -> dict[str, str]:
    """The manifest's hashes by file name.

    Raises:
        ValueError: it is no manifest, or that of another step; the message names it. OSError: it cannot be read.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(files.read_text(file))
        step, hashes = manifest["step"], manifest["sha256"]
        if not isinstance(hashes, dict) or STATE not in hashes:
            raise ValueError("no hashes of a checkpoint's files")
        if strange := [name for name in hashes if not LISTED.fullmatch(name)]:
            raise ValueError(f"it lists {strange[0]!a:.80}, which is no file of a checkpoint")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is unreadable ({error})") from error
    if type(step) is not int or str(step) != folder.name.split(".")[0]:
        raise ValueError(f"{file} is of step {step!a:.20}, not of {folder.name.split('.')[0]}")
    return hashes


def latest(run: Path, warn: Callable[[str], None] = warnings.warn) -> Path:
    """The newest sound checkpoint; damaged ones are named through `warn` and passed over.

    Its hashes have been compared: `read(folder, verified=True)` does not compare them again.

    Raises:
        CheckpointError: there is none.
    """
    for folder in reversed(_numbered(run)):
        wrong = damage(folder)
        if wrong is None:
            return folder
        warn(f"checkpoint refused: {wrong}; looking for one before it")
    raise CheckpointError(f"no usable checkpoint in {run / 'checkpoint'}; begin in a new run folder")


def read(folder: Path, verified: bool = False) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """All tensors by file name, and the state, of a checkpoint: of the files that its manifest lists.

    Args:
        verified: its hashes have just been compared (`latest` does); otherwise they are compared here.
    Raises:
        CheckpointError: missing or damaged.
    """
    if not verified and (wrong := damage(folder)) is not None:
        raise CheckpointError(f"checkpoint refused: {wrong}")
    file = folder / MANIFEST
    try:
        tensors = {}
        for name in _hashes(folder):
            file = folder / name
            if name != STATE:
                tensors[file.stem] = load_file(file)
        file = folder / STATE
        return tensors, json.loads(files.read_text(file))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint refused: {file} is unreadable ({error})") from error


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """`save_file`, whose own error is none of the system's."""
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        code = re.search(r"(?:os error|code:) (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from error


def sha256_of(file: Path) -> str:
    """Of an ordinary file, in hexadecimal digits."""
    with files.open_file(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # it is a FileIO
