"""Open a task: its training, validation and test splits.

Splits that the source has are used as they are. Missing ones are taken from the training images, so that no model is
selected by test images. `splits.py` chooses these images.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_bsr.data.image_files import UnreadableImage
from moe_bsr.data.packed import open_pack
from moe_bsr.data.spec import ImageSource, TaskImages, TaskSpec
from moe_bsr.data.splits import evenly, fewest_hashes, held_out

TEST_FRACTION = 0.2  # of a source without a test split, if the task file does not set `test_fraction`


@dataclass(frozen=True)
class Split:
    """One split: some images of a source.

    Attributes:
        index: int64 (N,), indices into the source; -1 for an image of a run's record that no longer exists.
        labels: int64 (N,), aligned with `index`.
        gone: names of the images that no longer exist, by position.
    """

    source: ImageSource
    index: np.ndarray
    labels: np.ndarray
    gone: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def expect(self, places: Iterable[int]) -> None:
        """Announce images, by their indices in the source, so that a source on a network can fetch them in advance."""
        if hasattr(self.source, "expect"):
            self.source.expect([place for place in places if place >= 0])

    def place(self, position: int) -> int:
        """Return the index in the source of the image at a position of this split.

        Raises:
            UnreadableImage: the image no longer exists.
        """
        if (index := int(self.index[position])) < 0:
            raise UnreadableImage(f"{self.gone.get(position, f'image {position}')}: gone since the run began")
        return index

    def digest(self) -> str:
        """Return the number of images, and a hash of which images these are and of their labels."""
        names = self.source.names
        listed = [] if names is None else [str(names[i]) for i in self.index if 0 <= i < len(names)]
        named = "\n".join(listed).encode("utf-8", "surrogateescape")
        parts = (np.ascontiguousarray(self.index).tobytes(), np.ascontiguousarray(self.labels).tobytes(), named)
        return f"{len(self)} images, {hashlib.sha256(b'|'.join(parts)).hexdigest()[:12]}"

    def select(self, positions: np.ndarray) -> "Split":
        """Return the images at these positions, int64 (M,), in this order."""
        gone = {new: self.gone[old] for new, old in enumerate(positions.tolist()) if old in self.gone}
        return Split(self.source, self.index[positions], self.labels[positions], gone)


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task with its splits.

    Attributes:
        origin: where the images come from, in one line.
        notes: lines for the user about how the images are used.
    """

    name: str
    title: str
    class_names: list[str]
    train: Split
    val: Split
    test: Split
    origin: str
    spec: TaskSpec
    notes: list[str] = field(default_factory=list)

    def select(self, name: str, positions: np.ndarray) -> "TaskData":
        """Return a copy whose split `name` has the images at these positions alone, in this order."""
        changed: dict[str, Any] = {name: getattr(self, name).select(positions)}
        return replace(self, **changed)

    def thinned(self, name: str, most: int) -> "TaskData":
        """Return a copy with at most `most` images in split `name`, at evenly spaced positions."""
        count = len(getattr(self, name))
        return self if count <= most else self.select(name, np.linspace(0, count - 1, most).round().astype(int))


def load_task(
    spec: TaskSpec,
    *,
    root: Path,
    download: bool = False,
    val_fraction: float = 0.1,
    val_images: int | None = None,
    train_images: int | None = None,
    split_seed: int = 0,
) -> TaskData:
    """Open a task, and set aside validation and test images if its source has no such splits.

    Args:
        root: the data root.
        download: whether missing data may be downloaded.
        val_fraction: share of the training images to set aside for validation, see `splits.held_out`.
        val_images: largest number of validation images, chosen by the same hash; None for no limit. If they come from
            the training images, the rest stays there.
        train_images: largest number of training images, equally many of each class as far as it has them; None for no
            limit.
        split_seed: seed of these choices.
    Raises:
        FileNotFoundError: data are missing. The message says what is expected where.
        ValueError: the data contradict the task file or each other. The message names the task.
    """
    images = open_images(spec, root=Path(root), download=download)
    train, rest = images.train, np.arange(len(images.train))
    notes = list(images.unused)
    try:
        if images.test is None:
            fraction = TEST_FRACTION if spec.test_fraction is None else spec.test_fraction
            rest, chosen = _hold_out(train, rest, fraction, split_seed, "test")
            test = Split(train, chosen, train.labels[chosen])
            notes.append(f"no test split: {len(chosen)} of {len(train)} images are set aside for it")
        else:
            test = Split(images.test, np.arange(len(images.test)), images.test.labels)
        if images.val is None:
            before, (rest, chosen) = rest, _hold_out(train, rest, val_fraction, split_seed, "validation")
            if val_images is not None and val_images < len(chosen):
                chosen = _some(train, chosen, val_images, split_seed)
                rest = np.setdiff1d(before, chosen)
            val = Split(train, chosen, train.labels[chosen])
        else:
            own = np.arange(len(images.val))
            chosen = own if val_images is None else _some(images.val, own, val_images, split_seed)
            val = Split(images.val, chosen, images.val.labels[chosen])
            used = "" if len(val) == len(own) else f", {len(val)} of them used (data.val_images)"
            notes.append(f"the data's own validation split: {len(own)} images{used}")
    except ValueError as error:
        raise ValueError(f"task {spec.name}: {error} ({images.origin})") from None
    if train_images is not None and train_images < len(rest):
        notes.append(f"{train_images} of {len(rest)} training images are used (data.train_images)")
        rest = rest[evenly(train.labels[rest], _names(train, rest), train_images, split_seed, "training")]
    uncovered = len(train.class_names) - len(np.unique(val.labels))
    if uncovered:
        notes.append(f"{uncovered} of {len(train.class_names)} classes have no validation image")
    return TaskData(
        name=spec.name,
        title=spec.title,
        class_names=list(train.class_names),
        train=Split(train, rest, train.labels[rest]),
        val=val,
        test=test,
        origin=images.origin,
        spec=spec,
        notes=notes,
    )


def open_images(spec: TaskSpec, *, root: Path, download: bool = False, use_pack: bool = True) -> TaskImages:
    """Open the images of a task, with the splits of its source, and check them against the task file.

    A pack at `<root>/<name>` replaces the source unless `use_pack` is false. Errors are those of `load_task`.
    """
    pack = root / spec.name
    packed = use_pack and (pack / "train.npz").is_file()
    images = open_pack(pack, spec.bits) if packed else spec.open(root, download)
    names, origin = list(images.train.class_names), images.origin
    if len(names) < 2:
        raise ValueError(f"task {spec.name}: {len(names)} class, but at least two are needed ({origin})")
    if unwritable := [name for name in names if _is_undecodable(name)]:
        raise ValueError(
            f"task {spec.name}: the class {unwritable[0]!a} is not UTF-8 text, and could not be written into a run: "
            f"rename its folder or label ({origin})"
        )
    for split, source in (("train", images.train), ("val", images.val), ("test", images.test)):
        if source is not None and list(source.class_names) != names:
            raise ValueError(f"task {spec.name}: the classes of train and {split} differ ({origin})")
        if source is not None and not len(source):
            raise ValueError(f"task {spec.name}: its {split} split has no images with labels ({origin})")
    if spec.classes not in (None, len(names)):
        raise ValueError(
            f"task {spec.name}: classes: {spec.classes} in its file, but {len(names)} in the data ({origin})"
        )
    if images.test is not None and spec.test_fraction is not None:
        raise ValueError(
            f"task {spec.name}: test_fraction: {spec.test_fraction}, but the data have a test split ({origin}); "
            "remove the key to use that split"
        )
    return images


def _is_undecodable(name: str) -> bool:
    """Return whether a name has bytes that are not UTF-8, which Python represents as lone surrogates."""
    return any("\ud800" <= letter <= "\udfff" for letter in name)


def _hold_out(
    source: ImageSource, among: np.ndarray, fraction: float, seed: int, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Apply `held_out` to the images `among` of a source. Returns indices into the source."""
    kept, out = held_out(source.labels[among], _names(source, among), fraction, seed, purpose)
    return among[kept], among[out]


def _some(source: ImageSource, among: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` of the validation images `among`."""
    return among[fewest_hashes(_names(source, among), count, seed, "validation")]


def _names(source: ImageSource, among: np.ndarray) -> list[str]:
    return [str(i) for i in among] if source.names is None else [source.names[i] for i in among]
