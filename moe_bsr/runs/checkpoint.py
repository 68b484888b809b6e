"""Write and read checkpoints. A crash at any moment leaves the previous ones intact.

A checkpoint is a folder `checkpoint/<step>/` of safetensors files, `state.json` and `manifest.json`, which is written
last and has the sha256 of each file. The folder is written as `<step>.tmp`, every file and folder is synced to disk,
then it is renamed. So a crash leaves at most a `.tmp` folder to delete. There are no pickles. Hashes are verified
before use, and only files that the manifest lists are read. Files with other names are left alone.
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

KEPT = 2  # number of newest checkpoints to keep, in addition to the best one
STATE, MANIFEST = "state.json", "manifest.json"
LISTED = re.compile(r"state\.json|\w+\.safetensors", re.ASCII)
UNFINISHED = re.compile(r"(\d+)(\.before)?\.tmp", re.ASCII)


class CheckpointError(RuntimeError):
    """There is no usable checkpoint, or it does not fit the model. The message names the file."""


def save(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write `checkpoint/<step>/` and delete checkpoints that are no longer needed.

    Args:
        tensors: by file name (without suffix) and tensor name. Each becomes one safetensors file.
        state: content of state.json. Its "best_step" names a checkpoint to keep, whatever its age.
    Returns:
        The checkpoint's folder.
    Raises:
        OSError: the checkpoint could not be written. The message names the folder, the size and a remedy.
    """

    def write(temporary: Path, mode: int) -> dict[str, str]:
        hashes = {}
        for name, group in tensors.items():
            file = temporary / f"{name}.safetensors"
            _save_tensors({k: v.detach().cpu().contiguous() for k, v in group.items()}, file)
            file.chmod(mode)  # safetensors makes its files readable by their owner only
            files.sync(file)
            hashes[file.name] = sha256_of(file)
        return hashes

    size = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    return _replace(run, step, state, write, size)


def save_state(run: Path, step: int, state: dict[str, Any]) -> Path:
    """Replace the state of the checkpoint at this step. Its tensors stay and are hard-linked instead of copied.

    Returns:
        The checkpoint's folder.
    Raises:
        OSError: as `save`.
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
        if files.kind(final):  # a resumed run saves this step again. Between the renames, `recover` finds `temporary`.
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
    """Delete a partly written checkpoint to free its disk space."""
    if files.kind(temporary) == "a folder":
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(run: Path, before: Path) -> None:
    """Delete checkpoints that are no longer needed. One that cannot be deleted does no harm."""
    folder = run / "checkpoint"
    newest = steps(run)[-KEPT:]
    # Keep the best checkpoint of each kept one: a resume from the older of the two must still find its best.
    kept = set(newest) | {best_step(folder / str(step)) for step in newest}
    for old in [before, *(folder / str(step) for step in steps(run) if step not in kept)]:
        try:
            files.remove(old)
        except OSError as error:
            warnings.warn(f"{old} could not be deleted ({error}); it is no longer needed", stacklevel=4)


def check_room(run: Path, sizes: dict[str, int], count: int) -> None:
    """Check that a run's checkpoints fit on the disk.

    Args:
        sizes: bytes of each file of a checkpoint, by name without suffix.
        count: number of checkpoints that are on the disk at the same time.
    Raises:
        ConfigError: they do not fit. The message has the MB needed and the MB free.
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
            f"{run}: a checkpoint's {name}.safetensors needs {sizes[name] / 2**20:.1f} MB, and a file may have at most "
            f"{limit / 2**20:.1f} MB; raise the limit of a file's size (ulimit -f)"
        )


def recover(run: Path) -> None:
    """Finish a save that was interrupted between its two renames. Call it only before training goes on in this folder.

    Raises:
        CheckpointError: `checkpoint` is not a folder.
    """
    for temporary in sorted(_unfinished(_folder(run)), key=lambda path: len(path.name)):  # .tmp before .before.tmp
        final = temporary.with_name(temporary.name.split(".")[0])
        if files.kind(final) is None and damage(temporary) is None:
            temporary.rename(final)


def _unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.tmp") if UNFINISHED.fullmatch(path.name)]


def best_step(folder: Path) -> int | None:
    """Return the best step so far at the time this checkpoint was written. None if there was none."""
    best = _peek(folder, "best_step")
    return best if type(best) is int else None


def unreadable_images(run: Path, task: str) -> set[str]:
    """Return the names of a task's images that the run could not read so far, from its newest checkpoint."""
    newest = steps(run)[-1:]
    met = _peek(run / "checkpoint" / str(newest[0]), "skipped") if newest else None
    splits = met.get(task) if isinstance(met, dict) else None
    return {name for names in splits.values() for name in names} if isinstance(splits, dict) else set()


def _peek(folder: Path, key: str) -> Any:
    """Return a value of a checkpoint's state without verifying its hash. None if it cannot be read."""
    try:
        return json.loads(files.read_text(folder / STATE))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def steps(run: Path) -> list[int]:
    """Return the steps of the existing checkpoints, ascending. None of them is verified.

    Raises:
        CheckpointError: `checkpoint` is not a folder.
    """
    return [int(folder.name) for folder in _numbered(run) if files.kind(folder) == "a folder"]


def _numbered(run: Path) -> list[Path]:
    """Return all paths with the name of a checkpoint, by ascending step. They may be no folders."""
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
    """Return what is wrong with a checkpoint, or None. Compares the hash of every file."""
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
    """Return the manifest's hashes by file name.

    Raises:
        ValueError: it is no manifest, or that of another step. The message names it. OSError: it cannot be read.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(files.read_text(file))
        step, hashes = manifest["step"], manifest["sha256"]
        if not isinstance(hashes, dict) or STATE not in hashes:
            raise ValueError("it has no hashes of a checkpoint's files")
        if strange := [name for name in hashes if not LISTED.fullmatch(name)]:
            raise ValueError(f"it lists {strange[0]!a:.80}, which is no file of a checkpoint")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is unreadable ({error})") from error
    if type(step) is not int or str(step) != folder.name.split(".")[0]:
        raise ValueError(f"{file} is of step {step!a:.20}, not of {folder.name.split('.')[0]}")
    return hashes


def latest(run: Path, warn: Callable[[str], None] = warnings.warn) -> Path:
    """Return the folder of the newest intact checkpoint. Damaged ones are reported through `warn` and skipped.

    Its hashes have been compared, so it can be read by `read(folder, verified=True)`.

    Raises:
        CheckpointError: there is no intact checkpoint.
    """
    for folder in reversed(_numbered(run)):
        wrong = damage(folder)
        if wrong is None:
            return folder
        warn(f"checkpoint refused: {wrong}; looking for an earlier one")
    raise CheckpointError(f"no usable checkpoint in {run / 'checkpoint'}; begin in a new run folder")


def read(folder: Path, verified: bool = False) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read the files of a checkpoint that its manifest lists.

    Args:
        verified: whether the hashes have just been compared, as by `latest`. If not, they are compared here.
    Returns:
        Tensors by file name (without suffix) and name, and the state.
    Raises:
        CheckpointError: a file is missing or damaged.
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
    """Call `save_file`, and turn its SafetensorError into the OSError that caused it."""
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        code = re.search(r"(?:os error|code:) (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from error


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a regular file in hexadecimal digits."""
    with files.open_file(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # it is a FileIO
