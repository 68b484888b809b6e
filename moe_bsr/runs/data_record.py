"""Record a run's images when it begins, and compare them with the data on each resume and evaluation.

`config.yaml` has each task's specification, its classes and a hash of each split. `images/<task>.json.gz` lists the
images: name, bytes, label and, for up to 1,000 images of a split, a checksum. So a change can be named. The list also
fixes the splits: the run ignores images that were added later, and no image moves to another split.
"""

import dataclasses
import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_bsr.config import ConfigError
from moe_bsr.data import Split, TaskData, TaskSpec
from moe_bsr.data.class_names import composed
from moe_bsr.data.spec import ImageSource
from moe_bsr.data.splits import SPLITS, image_key
from moe_bsr.runs import checkpoint
from moe_bsr.runtime import files
from moe_bsr.runtime.files import write_whole

SHOWN = 3  # names in a message
READ = 1000  # at most so many images of a split are compared by checksum, the others by size


@dataclass(slots=True)
class Changes:
    """Differences between a split as the run began with it and as it is now, by image name.

    Attributes:
        gone: images that no longer exist.
        altered: images with other contents or another label.
        added: images that are new.
        replaced: images that the run could not read and that have other contents now.
        other: difference in words, if the images have no names or the run's list of them is lost.
    """

    gone: list[str] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    other: str = ""

    def __bool__(self) -> bool:
        return bool(self.gone or self.altered or self.added or self.replaced or self.other)

    def lost(self, unreadable: str) -> bool:
        """Whether an image that the run began with is altered, or missing and `unreadable` is "stop"."""
        return bool(self.altered or self.other or (self.gone and unreadable == "stop"))

    def doubtful(self, split: Split) -> list[int]:
        """Return the positions in the split of images that are missing or altered."""
        altered, names = set(map(composed, self.altered)), split.source.names or []
        return [p for p, i in enumerate(split.index) if p in split.gone or (altered and composed(names[i]) in altered)]

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
            for names, what in (
                (self.gone, "gone"),
                (self.altered, "with other contents"),
                (self.replaced, "that could not be read and was replaced"),
                (self.added, "new"),
            )
            if names
        ]
        return ", ".join([*parts, *([self.other] if self.other else [])])


def write(run: Path, data: TaskData) -> dict[str, Any]:
    """Write the list of a task's images, if they have names, and return the task's entry of `config.yaml`."""
    listed = {name: _listed(split) for name, split in _splits(data).items()}
    if all(split["names"] is not None for split in listed.values()):
        file = list_of(run, data.name)
        files.require(file.parent, "a folder")
        file.parent.mkdir(exist_ok=True)
        write_whole(file, gzip.compress(json.dumps(listed).encode(), mtime=0))
    return {
        "origin": data.origin,
        "spec": {"source": data.spec.source} | _keys(data.spec),
        "classes": list(data.class_names),
        "splits": {name: {"images": len(split["labels"]), "sha256": _sha256(split)} for name, split in listed.items()},
    }


def problem(about: dict[str, Any]) -> str | None:
    """Check the form of a task's entry that `write` made, read from a file. Return what is wrong with it, or None."""
    splits = about.get("splits")
    for name in SPLITS:
        split = splits.get(name) if isinstance(splits, dict) else None
        if not isinstance(split, dict) or not isinstance(split.get("images"), int) or "sha256" not in split:
            return f"splits.{name} is no number of images and their sha256"
    return None if isinstance(about.get("spec"), dict) else "spec holds no keys and values"


def check_spec(run: Path, spec: TaskSpec, about: dict[str, Any]) -> None:
    """Raise ConfigError if a task's file has changed since the run began.

    Keys that tell where the images are may change (`may_change`), since the images themselves are compared.
    """
    then, now = about["spec"], _keys(spec)
    for key in sorted(now.keys() - set(spec.may_change)):
        if key in then and then[key] != now[key]:
            raise ConfigError(
                f"cannot resume {run}: in the file of task {spec.name} {key} was {then[key]}, now {now[key]}; "
                "put it back, or begin in another folder"
            )


def follow(run: Path, data: TaskData, about: dict[str, Any]) -> tuple[TaskData, dict[str, Changes]]:
    """Restore the splits that the run began with from the data as they are now.

    Training and validation images are the recorded ones in the recorded order: positions stay the same, and new images
    are left out. A missing image keeps its position (`Split.place` refuses it). A test split with a source of its own
    is taken as it is now.

    Args:
        about: the task's entry that `write` made.
    Returns:
        The data with these splits, and the changes by split.
    Raises:
        ConfigError: the data have other classes than the run was trained on.
    """
    if list(data.class_names) != about["classes"]:
        then, now = set(about["classes"]), set(data.class_names)
        what = ", ".join([*(f"{c!r} is gone" for c in then - now), *(f"{c!r} is new" for c in now - then)])
        raise ConfigError(
            f"task {data.name}: its data now have other classes than the run was trained on: "
            f"{what or 'in another order'} ({data.origin})"
        )
    current = {name: _listed(split) for name, split in _splits(data).items()}
    moved = [name for name in SPLITS if _sha256(current[name]) != about["splits"][name]["sha256"]]
    if not moved:
        return data, {name: Changes() for name in SPLITS}
    images = _read_images(run, data.name, about)
    changes = {name: Changes() for name in SPLITS}
    if images is None or any(split["names"] is None for split in current.values()):
        for name in moved:
            count = about["splits"][name]["images"], len(current[name]["labels"])
            changes[name].other = (
                "other images or labels" if count[0] == count[1] else "{} images, now {}".format(*count)
            )
        return data, changes
    known = {composed(image) for split in images.values() for image in split["names"]}
    met = {composed(image) for image in checkpoint.unreadable_images(run, data.name)}
    splits: dict[str, Split] = {}
    for name, split in _splits(data).items():
        splits[name], changes[name] = _followed(split, images[name])
        changes[name].replaced = [image for image in changes[name].altered if composed(image) in met]
        changes[name].altered = [image for image in changes[name].altered if composed(image) not in met]
        changes[name].added = sorted({image for image in current[name]["names"] if composed(image) not in known})
        if name == "test" and split.source is not data.train.source:
            splits[name] = split
    return dataclasses.replace(data, train=splits["train"], val=splits["val"], test=splits["test"]), changes


def _followed(split: Split, then: dict[str, Any]) -> tuple[Split, Changes]:
    """Find the recorded images of a split in its source. Return the restored split and what has changed."""
    source = split.source
    assert source.names is not None and source.sizes is not None
    place = {composed(image): i for i, image in enumerate(source.names)}  # disks differ in the Unicode form of names
    place |= {image: i for i, image in enumerate(source.names)}  # if both forms are there, each is an image of its own
    index = np.array([place.get(image, place.get(composed(image), -1)) for image in then["names"]], dtype=np.int64)
    labels, sizes = np.array(then["labels"], dtype=np.int64), np.array(then["sizes"], dtype=np.int64)
    there = index >= 0
    same = (source.labels[index] == labels) & (source.sizes[index] == sizes)
    for position in np.flatnonzero(there & same):
        then_read = then["checksums"][position]
        same[position] = then_read is None or then_read == _checksum(source, int(index[position]))
    changes = Changes(
        gone=[then["names"][i] for i in np.flatnonzero(~there)],
        altered=[then["names"][i] for i in np.flatnonzero(there & ~same)],
    )
    gone = {int(i): then["names"][i] for i in np.flatnonzero(~there)}
    return Split(source, index, labels, gone), changes


def _splits(data: TaskData) -> dict[str, Split]:
    return {name: getattr(data, name) for name in SPLITS}


def _listed(split: Split) -> dict[str, Any]:
    """List the images of a split in its order: names (or None), bytes (or None), checksums (or None) and labels."""
    source, index = split.source, split.index
    every = -(-len(index) // READ)
    read = [i for i in index.tolist() if image_key(source, i) % every == 0]
    split.expect(read)
    checksums = {i: _checksum(source, i) for i in read}
    return {
        "names": None if source.names is None else [source.names[i] for i in index],
        "sizes": None if source.sizes is None else source.sizes[index].tolist(),
        "checksums": [checksums.get(i) for i in index.tolist()],
        "labels": split.labels.tolist(),
    }


def _checksum(source: ImageSource, index: int) -> int | None:
    """Return the CRC-32 of an image's file, or None if there is no file or it cannot be read."""
    try:
        encoded = source.encoded(index) if hasattr(source, "encoded") else None
    except OSError:
        return None
    return None if encoded is None else zlib.crc32(encoded)


def _sha256(listed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def _keys(spec: TaskSpec) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(spec).items() if key != "name"}


def list_of(run: Path, task: str) -> Path:
    """Return the path of the file that lists a task's images."""
    return run / "images" / f"{task}.json.gz"


def _read_images(run: Path, task: str, about: dict[str, Any]) -> dict[str, Any] | None:
    """Return the list that `write` wrote. None if it is missing or does not match the recorded hashes."""
    try:
        listed = json.loads(gzip.decompress(files.read_bytes(list_of(run, task))))
        sound = all(_sha256(listed[name]) == about["splits"][name]["sha256"] for name in SPLITS)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    return listed if sound else None
