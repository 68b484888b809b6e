"""Source "torchvision": torchvision's datasets in their official layouts.

This is the only file that uses private names of torchvision: `_labels`, `_image_files` and `_images` of its datasets,
which have no public equivalents. A test opens every dataset in `TORCHVISION` and compares it with torchvision's images.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torchvision

from moe_bsr.config import require
from moe_bsr.config.errors import nearest
from moe_bsr.data.image_files import FileSource
from moe_bsr.data.spec import SOURCES, TaskImages, TaskSpec

# dataset -> (splits that torchvision has, files that it expects below the data root)
TORCHVISION = {
    "CIFAR10": (
        ("train", "test"),
        "cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch, batches.meta",
    ),
    "CIFAR100": (("train", "test"), "cifar-100-python/ with train, test, meta"),
    "Flowers102": (
        ("train", "val", "test"),
        "flowers-102/ with jpg/image_00001.jpg and so on, imagelabels.mat, setid.mat",
    ),
    "OxfordIIITPet": (
        ("trainval", "test"),
        "oxford-iiit-pet/ with images/*.jpg, annotations/trainval.txt, annotations/test.txt",
    ),
    "Food101": (
        ("train", "test"),
        "food-101/ with images/<class>/*.jpg, meta/train.json, meta/test.json",
    ),
}


@SOURCES.register("torchvision")
@dataclass(frozen=True, kw_only=True)
class TorchvisionTask(TaskSpec):
    """One of torchvision's datasets.

    Attributes:
        dataset: name of torchvision's class, one of `TORCHVISION`.
        splits: the torchvision splits that form "train", "test" and optionally "val". None may be used twice.
    """

    dataset: str
    splits: dict[str, list[str]] = field(default_factory=lambda: {"train": ["train"], "test": ["test"]})

    def __post_init__(self) -> None:
        super().__post_init__()
        splits = self.splits
        require(
            {"train", "test"} <= splits.keys() <= {"train", "val", "test"} and all(splits.values()),
            "splits",
            splits,
            "the keys train and test, and optionally val, each a list of split names",
        )
        names = [name for part in splits.values() for name in part]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, "splits", splits, f"no split may be in train and in test or val, as {twice} are")
        _check(self.dataset, names)

    def open(self, root: Path, download: bool = False) -> TaskImages:
        sources = {
            split: TorchvisionSource(self.dataset, root, names, download) for split, names in self.splits.items()
        }
        return TaskImages(
            train=sources["train"],
            val=sources.get("val"),
            test=sources["test"],
            origin=f"torchvision {self.dataset} in {root}",
        )


def _check(dataset: str, splits: list[str]) -> None:
    require(
        dataset in TORCHVISION, "dataset", dataset, f"one of {', '.join(TORCHVISION)}{nearest(dataset, TORCHVISION)}"
    )
    known = TORCHVISION[dataset][0]
    for split in splits:
        require(split in known, "splits", split, f"{dataset} has {', '.join(known)}")


class TorchvisionSource(FileSource):
    """Source of one dataset of `TORCHVISION` in its official layout below `root`. Several splits are concatenated.

    Args:
        download: whether torchvision may download missing files; it verifies their checksums.
    Raises:
        ConfigError: unknown dataset or split.
        FileNotFoundError: files are missing. The message says where they are expected.
    """

    def __init__(self, dataset: str, root: Path, splits: list[str], download: bool = False):
        _check(dataset, splits)
        parts = [_open_torchvision(dataset, root, split, download) for split in splits]
        labels = [getattr(part, "_labels", None) or part.targets for part in parts]
        images = [_images(part) for part in parts]
        super().__init__(
            [image for part in images for image in part],
            np.concatenate(labels),
            list(parts[0].classes),
            root / TORCHVISION[dataset][1].split("/")[0],
        )
        if not isinstance(self.files[0], Path):
            self.names = None
        else:
            missing = [path for path in self.files if not path.exists()]
            if missing:
                raise FileNotFoundError(
                    f"{dataset}: {len(missing)} of {len(self.files)} images are missing, the first "
                    f"is {missing[0]}; remove {root / TORCHVISION[dataset][1].split('/')[0]} and "
                    "download or unpack it again"
                )

    @property
    def sizes(self) -> np.ndarray | None:
        return None if self.names is None else super().sizes

    def image(self, i: int) -> np.ndarray:
        image = self.files[i]
        return image if isinstance(image, np.ndarray) else super().image(i)

    def encoded(self, i: int) -> bytes | None:
        return None if isinstance(self.files[i], np.ndarray) else super().encoded(i)


def _open_torchvision(dataset: str, root: Path, split: str, download: bool) -> Any:
    layout = TORCHVISION[dataset][1]
    choice = {"train": split == "train"} if dataset.startswith("CIFAR") else {"split": split}
    try:
        return getattr(torchvision.datasets, dataset)(root, download=download, **choice)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{dataset} was not found in {root}: {error}\n"
            f"Expected {root}/{layout}. Either allow the download (data.download=true; torchvision "
            "verifies the checksums), or put the official files there."
        ) from error


def _images(part: Any) -> list[Path] | np.ndarray:
    """Return the image files of a torchvision dataset, or its arrays if it has no files.

    There is no public way to the files: `part[i]` returns decoded images only.
    """
    for name in ("_image_files", "_images", "data"):
        if hasattr(part, name):
            return getattr(part, name)
    raise TypeError(f"{type(part).__name__}: its list of images was not found in this version of torchvision")
