"""Ways to damage a run folder: files are cut, replaced, linked, renamed or forged.

Each takes the run folder, a file outside of it that must not change (the canary), and a source of random choices. It
returns a description of the damage.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

CANARY = b"nobody may write here\n"


def _checkpoint(run: Path, rng: random.Random) -> Path:
    """Choose a checkpoint, mostly the newest."""
    there = steps(run)
    return run / "checkpoint" / str(there[-1] if rng.random() < 0.7 else rng.choice(there))


def _file(run: Path, rng: random.Random) -> Path:
    files = sorted(path for path in _checkpoint(run, rng).iterdir() if path.is_file())
    return rng.choice([*files, *files, run / "config.yaml", run / "metrics.jsonl"])


def _change_bytes(run: Path, canary: Path, rng: random.Random) -> str:
    file = _file(run, rng)
    data = bytearray(file.read_bytes())
    how = rng.choice(["truncated", "a bit flipped", "emptied", "grown", "zeroed", "half of it random"])
    at = rng.randrange(max(1, len(data)))
    if how == "truncated":
        data = data[:at]
    elif how == "a bit flipped" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif how == "emptied":
        data = bytearray()
    elif how == "grown":
        data += rng.randbytes(rng.choice([1, 4096]))
    elif how == "zeroed":
        data = bytearray(len(data))
    else:
        data[at:] = rng.randbytes(len(data) - at)
    file.write_bytes(data)
    return f"{file.relative_to(run)} {how}"


def _replace_file(run: Path, canary: Path, rng: random.Random) -> str:
    file = _file(run, rng)
    how = rng.choice(
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


def _link_out(run: Path, canary: Path, rng: random.Random) -> str:
    """Replace something that a run writes by a link to a place outside."""
    name = rng.choice(
        ["config.yaml.tmp", "report.json", "report.json.tmp", "report.md", "report.md.tmp", "test_evaluations.log",
         "metrics.jsonl", "checkpoint", "checkpoint/9.tmp", "checkpoint/9", "tensorboard", "lock", "images"]
    )  # fmt: skip
    path = run / name
    outside = canary.parent / "outside"
    remove(path)
    remove(outside)
    if name in ("checkpoint", "checkpoint/9.tmp", "checkpoint/9", "tensorboard", "images"):
        outside.mkdir()
        (outside / "9.tmp").mkdir()
        (outside / "9.tmp" / "kept").hardlink_to(canary)
        path.symlink_to(outside)
    else:
        path.symlink_to(canary)
    return f"{name} is a link out"


def _strange_names(run: Path, canary: Path, rng: random.Random) -> str:
    name = rng.choice(
        ["notes.tmp", "7.tmp", "seven", "007", "-1", "9" * 30, "6.before.tmp", "٣", ".tmp", "5 ", "1e3", "6.tmp.tmp"]
    )
    path = run / "checkpoint" / name
    how = rng.choice(["a file", "an empty folder", "a copy", "a link"])
    if path.exists():
        return f"{name} was there"
    if how == "a file":
        path.write_text("x")
    elif how == "an empty folder":
        path.mkdir()
    elif how == "a copy":
        shutil.copytree(run / "checkpoint" / str(steps(run)[-1]), path)
    else:
        path.symlink_to(canary)
    return f"checkpoint/{name!r} is {how}"


def _unlisted(run: Path, canary: Path, rng: random.Random) -> str:
    """Remove a file from the manifest, or add a file that the manifest does not list."""
    folder = _checkpoint(run, rng)
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = sorted(manifest["sha256"])
    if rng.random() < 0.5:
        name = rng.choice(listed)
        del manifest["sha256"][name]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        tensors = folder / name
        if tensors.suffix == ".safetensors" and rng.random() < 0.7:
            save_file({key: value + 1 for key, value in load_file(tensors).items()}, tensors)
        return f"{name} is no longer listed"
    name = rng.choice(["average.safetensors", "other.safetensors", "x.safetensors", "weights2.safetensors"])
    if name in listed:
        return f"{name} is listed"
    save_file({key: value + 7 for key, value in load_file(folder / "weights.safetensors").items()}, folder / name)
    return f"{name} is not listed"


def _forged(run: Path, canary: Path, rng: random.Random) -> str:
    """Change the content of a file, and make the hashes of the manifest fit."""
    folder = _checkpoint(run, rng)
    kind = rng.choice(["state", "tensors", "manifest"])
    what = {"state": _forge_state, "tensors": _forge_tensors, "manifest": _forge_manifest}[kind](folder, rng)
    return f"{folder.name}: {what}"


def _forge_state(folder: Path, rng: random.Random) -> str:
    file = folder / "state.json"
    state = json.loads(file.read_text())
    value = rng.choice([None, [], {}, "x", -1, 1.5, True, "../../elsewhere", 10**30, [[]]])
    if rng.random() < 0.2:
        state, key = value, "all of it"
    else:
        key = rng.choice(sorted(set(state) - {"seconds"}))
        if rng.random() < 0.3:
            del state[key]
            value = "gone"
        elif state[key] == value:
            value = state[key] = "x"
        else:
            state[key] = value
    file.write_text(json.dumps(state))
    _fit_hashes(folder)
    return f"state.json, {key} is {value!r}"


def _forge_tensors(folder: Path, rng: random.Random) -> str:
    file = folder / rng.choice(["weights.safetensors", "optimizer.safetensors", "average.safetensors"])
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    how = rng.choice(
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


def _forge_manifest(folder: Path, rng: random.Random) -> str:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    how = rng.choice(["step", "path", "absolute path", "device", "list", "no hashes", "number", "hash of nothing"])
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


def _forged_config(run: Path, canary: Path, rng: random.Random) -> str:
    """Change or remove a value of config.yaml."""
    file = run / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    places = list(_places(tree))
    owner, key = rng.choice(places)
    name, old = key, owner[key]
    if rng.random() < 0.4:
        del owner[key]
        value: Any = "gone"
    else:
        value = rng.choice([None, [], {}, "x", "../../x", -1, 0, 10**20, 1e400, True, [[1]], {"a": 1}])
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


def _several(run: Path, canary: Path, rng: random.Random) -> str:
    """Damage the run twice."""
    done = []
    for _ in range(2):
        if not _is_plain(run):  # the second damage would read a device without end, or write through a link
            break
        with contextlib.suppress(Exception):  # the first damage may leave nothing for the second
            done.append(KINDS[rng.choice(list(KINDS)[:-1])](run, canary, rng))
    return "; ".join(done)


def _is_plain(run: Path) -> bool:
    """Return whether the run folder has only regular files and folders."""
    return all(stat.S_ISREG(mode) or stat.S_ISDIR(mode) for mode in (path.lstat().st_mode for path in run.rglob("*")))


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


def _fit_hashes(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["sha256"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def steps(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints, in ascending order."""
    return sorted(int(path.name) for path in (run / "checkpoint").iterdir() if path.name.isdecimal())


def remove(path: Path) -> None:
    """Delete what is at a path, even without permissions on it."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            for inner in path.rglob("*"):
                with contextlib.suppress(OSError):
                    inner.chmod(0o700)
            shutil.rmtree(path, ignore_errors=True)
