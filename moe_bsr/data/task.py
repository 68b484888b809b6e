"""A task opened: its training, validation and test split, ready to be indexed.

The test split is the data set's own. The validation split comes from the training data, by a seed of its
own, so that no model is selected by test images.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_bsr.data.packed import open_pack
from moe_bsr.data.spec import ImageSource, TaskSpec
from moe_bsr.runtime.rng import key, stream

MAX_VALIDATION_IMAGES = 5000


@dataclass(frozen=True)
class Split:
    """Some images of a source: `index` int64 (N,) into it, `labels` int64 (N,) aligned with it."""

    source: ImageSource
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
    val_fraction: float = 0.1,
    split_seed: int = 0,
) -> TaskData:
    """Open a task and split its validation images off the training images.

    Args:
        root: the data root.
        val_fraction: share of the training images for validation, see `split_validation`.
        split_seed: of the choice of these images, which depends on the task's name as well.
    Raises:
        FileNotFoundError: says what is expected where.
        ValueError: data that contradict the task file or each other.
    """
    train, test, origin = open_sources(spec, root=Path(root), download=download)
    train_index, val_index = split_validation(train.labels, val_fraction, key(split_seed, spec.name, "carve"))
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


def open_sources(
    spec: TaskSpec, *, root: Path, download: bool = False, use_pack: bool = True
) -> tuple[ImageSource, ImageSource, str]:
    """The training and the test source of a task, and a line saying where they come from.

    A pack at `<root>/<name>` takes the place of the declared source unless `use_pack` is false.
    """
    pack = root / spec.name
    packed = use_pack and (pack / "train.npz").is_file()
    opened: tuple[ImageSource, ImageSource, str] = open_pack(pack) if packed else spec.open(root, download)
    train, test, origin = opened
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


def split_validation(labels: np.ndarray, fraction: float, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions 0..N-1 into training and validation, both sorted; a pure function.

    Validation holds `fraction` of the images (0 < fraction < 0.5), at most
    `MAX_VALIDATION_IMAGES`, in each class in proportion (largest remainder) but at least one; that
    minimum comes first. A class with a single image keeps it in training.
    """
    if not 0 < fraction < 0.5:
        raise ValueError(f"val_fraction: {fraction} is not between 0 and 0.5 (both excluded)")
    per_class = allocate_per_class(np.bincount(labels), fraction)
    if per_class.sum() == 0:
        raise ValueError("no image is left for validation: every class has a single image")
    shuffled = stream(key).permutation(len(labels))
    chosen = [shuffled[labels[shuffled] == label][:count] for label, count in enumerate(per_class) if count]
    val = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), val), val


def allocate_per_class(counts: np.ndarray, fraction: float) -> np.ndarray:
    """How many of each class's `counts` images go to validation, int64 (classes,)."""
    total = min(round(counts.sum() * fraction), MAX_VALIDATION_IMAGES)
    ideal = counts * (total / counts.sum())
    fewest, most = np.minimum(1, np.maximum(counts - 1, 0)), np.maximum(counts - 1, 0)
    chosen = np.clip(np.floor(ideal).astype(np.int64), fewest, most)
    while chosen.sum() < total and (chosen < most).any():
        chosen[np.argmax(np.where(chosen < most, ideal - chosen, -np.inf))] += 1
    while chosen.sum() > total and (chosen > fewest).any():
        chosen[np.argmax(np.where(chosen > fewest, chosen - ideal, -np.inf))] -= 1
    return chosen
