"""A task opened: its training, validation and test split, ready to be indexed.

The test split is what the data set calls so. The validation split is carved from the training data,
by a seed of its own, so that selecting a model never looks at test images.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_bsr.data.packed import PackedSource
from moe_bsr.data.sources import FolderSource, TorchvisionSource
from moe_bsr.data.spec import TaskSpec
from moe_bsr.runtime.rng import key, stream

MAX_VALIDATION_IMAGES = 5000


@dataclass(frozen=True)
class Split:
    """Some images of a source: `index` int64 (N,) into it, `labels` int64 (N,) aligned with it."""

    source: Any
    index: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task with its splits; `origin` says in one line where the images come from."""

    name: str
    title: str
    class_names: list[str]
    train: Split
    val: Split
    test: Split
    origin: str
    spec: TaskSpec


def load_task(
    spec: TaskSpec,
    *,
    root: Path,
    download: bool = False,
    validation: float = 0.1,
    data_seed: int = 0,
) -> TaskData:
    """Open a task and carve its validation split.

    `root` is the data root. Raises FileNotFoundError saying what is expected where, ValueError for
    data that contradict the task file or each other.
    """
    train, test, origin = open_sources(spec, root=Path(root), download=download)
    train_index, val_index = split_validation(train.labels, validation, key(data_seed, spec.name, "carve"))
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    if (lone := int((counts == 1).sum())) > 0:
        warnings.warn(
            f"task {spec.name}: {lone} classes have a single training image; it stays in training, "
            "so validation does not cover them",
            stacklevel=2,
        )
    return TaskData(
        name=spec.name,
        title=spec.title,
        class_names=list(train.class_names),
        train=Split(train, train_index, train.labels[train_index]),
        val=Split(train, val_index, train.labels[val_index]),
        test=Split(test, np.arange(len(test)), test.labels),
        origin=origin,
        spec=spec,
    )


def open_sources(spec: TaskSpec, *, root: Path, download: bool = False, use_pack: bool = True) -> tuple[Any, Any, str]:
    """The training and the test source of a task, and a line saying where they come from.

    A pack at `<root>/<name>` takes the place of the declared source unless `use_pack` is false.
    """
    pack = root / spec.name
    if use_pack and (pack / "train.npz").is_file():
        train, test, origin = *_open_pack(pack), f"pack {pack}"
    elif spec.source == "packed":
        pack = root / Path(spec.path).expanduser()
        train, test, origin = *_open_pack(pack), f"pack {pack}"
    elif spec.source == "torchvision":
        train, test = (
            TorchvisionSource(spec.dataset, root, spec.splits[split], download) for split in ("train", "test")
        )
        origin = f"torchvision {spec.dataset} in {root}"
    elif spec.source == "folder":
        train, test, origin = _open_folder(root / Path(spec.path).expanduser())
    else:
        from moe_bsr.data.generated import Generated  # the only source that draws: loaded where it is wanted

        train = Generated(spec.family, "train", spec.train, spec.seed)
        test = Generated(spec.family, "test", spec.test, spec.seed)
        origin = f"drawn: {spec.family}, seed {spec.seed}"
    if len(train.class_names) < 2:
        raise ValueError(
            f"task {spec.name}: {len(train.class_names)} class, and there must be two to tell apart ({origin})"
        )
    if list(train.class_names) != list(test.class_names):
        raise ValueError(f"task {spec.name}: train and test differ in their classes ({origin})")
    if spec.classes not in (None, len(train.class_names)):
        raise ValueError(
            f"task {spec.name}: classes: {spec.classes} in its file, but {len(train.class_names)} "
            f"in the data ({origin})"
        )
    return train, test, origin


def _open_pack(folder: Path) -> list[PackedSource]:
    return [PackedSource(folder / f"{split}.npz") for split in ("train", "test")]


def _open_folder(folder: Path) -> tuple[FolderSource, FolderSource, str]:
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise FileNotFoundError(
                f"{folder / split}: missing; expected {folder}/train/<class>/<image>.jpg and "
                f"{folder}/test/<class>/<image>.jpg (validation is carved from train, "
                "test images must be set aside by hand)"
            )
    train = FolderSource(folder / "train")
    return train, FolderSource(folder / "test", train.class_names), f"folder {folder}"


def split_validation(labels: np.ndarray, fraction: float, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions 0..N-1 into training and validation, both sorted; a pure function.

    Validation holds `fraction` of the images (0 < fraction < 0.5), at most
    `MOST_VALIDATION_IMAGES`, in each class in proportion (largest remainder) but at least one; that
    minimum comes first. A class with a single image keeps it in training.
    """
    if not 0 < fraction < 0.5:
        raise ValueError(f"validation: {fraction} is not between 0 and 0.5 (both excluded)")
    seats = allocate_per_class(np.bincount(labels), fraction)
    if seats.sum() == 0:
        raise ValueError("no validation image can be carved: every class has a single image")
    shuffled = stream(key).permutation(len(labels))
    chosen = [shuffled[labels[shuffled] == label][:count] for label, count in enumerate(seats) if count]
    val = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), val), val


def allocate_per_class(counts: np.ndarray, fraction: float) -> np.ndarray:
    """How many of each class's `counts` images go to validation, int64 (classes,)."""
    total = min(round(counts.sum() * fraction), MAX_VALIDATION_IMAGES)
    ideal = counts * (total / counts.sum())
    least, most = np.minimum(1, np.maximum(counts - 1, 0)), np.maximum(counts - 1, 0)
    seats = np.clip(np.floor(ideal).astype(np.int64), least, most)
    while seats.sum() < total and (seats < most).any():
        seats[np.argmax(np.where(seats < most, ideal - seats, -np.inf))] += 1
    while seats.sum() > total and (seats > least).any():
        seats[np.argmax(np.where(seats > least, seats - ideal, -np.inf))] -= 1
    return seats
