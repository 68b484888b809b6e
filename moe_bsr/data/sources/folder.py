"""Source "folder": images in one folder per class."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_bsr.data.class_folders import count_loose, entries, images_below
from moe_bsr.data.class_names import composed, look_alikes, split_named, unknown_class
from moe_bsr.data.image_files import FileSource
from moe_bsr.data.spec import SOURCES, TaskImages, TaskSpec
from moe_bsr.data.unused import Unused

EXPECTED = (
    "expected {0}/train/<class>/<image>.jpg (and optionally val/ and test/ beside train/) or {0}/<class>/<image>.jpg"
)


@SOURCES.register("folder")
@dataclass(frozen=True, kw_only=True)
class FolderTask(TaskSpec):
    """A folder with one folder per class, or with one folder per split that has a folder per class.

    Splits are called train, val (valid, validation, dev) and test, in upper or lower case. A class consists of the
    images in its folder and in all sub-folders.

    Attributes:
        path: the folder, absolute or below the data root.
    """

    path: str

    def folder(self, root: Path) -> Path:
        return root / Path(self.path).expanduser()

    def open(self, root: Path, download: bool = False) -> TaskImages:
        folder = self.folder(root)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; {EXPECTED.format(folder)}")
        unused = Unused(lambda path: path.removeprefix(f"{folder}{os.sep}"))
        places = _splits(folder, unused)
        train = FolderSource(places["train"], bits=self.bits, unused=unused)
        val, test = (_held_out(places.get(split), train.class_names, self.bits, unused) for split in ("val", "test"))
        return TaskImages(
            train=train,
            val=val,
            test=test,
            origin=f"folder {folder}",
            unused=[*unused.lines(), *look_alikes(train.class_names)],
        )


class NoImages(ValueError):
    """A folder contains no class folder with an image in it."""


class FolderSource(FileSource):
    """Source of the images `<folder>/<class>/**/*.jpg` (or png, webp, bmp, ...). Labels number the sorted class names.

    Args:
        class_names: the known classes, for a validation or test folder; None for a training folder.
        bits: bit depth of the values in 16-bit images, see `TaskSpec.bits`.
        unused: counter for everything that is not used.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a class is not among `class_names`, or with None a class has no images.
        NoImages: there is no class folder, or with `class_names` none that has an image.
    """

    def __init__(
        self,
        folder: Path,
        class_names: Sequence[str] | None = None,
        bits: int | None = None,
        unused: Unused | None = None,
    ):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected one folder of images per class below it")
        unused = Unused() if unused is None else unused
        found: dict[str, list[str]] = {}
        files, folders = entries(str(folder), unused)
        for entry in files:
            count_loose(entry, unused)
        for entry in folders:
            beside = Unused()
            images = images_below(entry.path, beside)
            if images or class_names is None:
                found.setdefault(composed(entry.name), []).extend(images)
            if not images and class_names is None:
                what = ", ".join(beside.found()) or "nothing"
                raise ValueError(f"{entry.path!r}: no images of class {entry.name!r}; found: {what}")
            unused.merge(beside)
        if not found:
            raise NoImages(f"{folder}: no class folders; expected {folder}/<class>/<image>.jpg")
        names = sorted(found) if class_names is None else list(class_names)
        if unknown := sorted(set(found) - set(names)):
            raise unknown_class(unknown[0], names, str(folder))
        position = {name: label for label, name in enumerate(names)}
        paths = [Path(path) for name in sorted(found) for path in found[name]]
        labels = [position[name] for name in sorted(found) for _ in found[name]]
        super().__init__(paths, np.array(labels), names, folder, bits)


def _held_out(folder: Path | None, class_names: list[str], bits: int | None, unused: Unused) -> FolderSource | None:
    """Open the images of a val or test folder; None if there is no such folder, or no image in it."""
    try:
        return None if folder is None else FolderSource(folder, class_names, bits, unused)
    except NoImages:
        return None


def _splits(folder: Path, unused: Unused) -> dict[str, Path]:
    """Return the folder of each split. If `folder` contains class folders and no splits, it is "train" itself.

    A folder called train or test that has no sub-folders is not a split: it is a class, or its images have no labels.
    """
    files, folders = entries(str(folder), Unused())
    named = {entry.name: split for entry in folders if (split := split_named(entry.name)) is not None}
    splits: dict[str, str] = {}
    for entry in folders:
        if entry.name in named and entries(entry.path, Unused())[1]:
            if (other := splits.setdefault(named[entry.name], entry.name)) != entry.name:
                raise ValueError(f"{folder}: {other!r} and {entry.name!r} are both for {named[other]}: keep one")
    if "train" not in splits:
        if splits or len(named) == len(folders) > 0:
            raise FileNotFoundError(
                f"{folder}: no train folder with class folders in it; {EXPECTED.format(folder)} "
                "(for images whose labels are in a table: source: csv)"
            )
        inner = [entry.name for entry in folders if os.path.isdir(os.path.join(entry.path, "train"))]
        if len(inner) == len(folders) > 1 and not any(
            entries(os.path.join(folder, name, "train"), Unused())[1] for name in inner
        ):
            raise ValueError(f"{folder}: the train folders are inside the class folders; {EXPECTED.format(folder)}")
        if inner:
            raise ValueError(f"{folder}: the train folder is in {inner[0]!r} within it: add that to path")
        return {"train": folder}
    for split, name in splits.items():
        inner = entries(str(folder / name), Unused())[1]
        if [split_named(entry.name) for entry in inner] == [split] and entries(inner[0].path, Unused())[1]:
            raise ValueError(f"{folder / name}: the class folders are in {inner[0].name!r} within it: move them up")
    for entry in files:
        count_loose(entry, unused)
    for entry in folders:
        if entry.name not in splits.values():
            for image in images_below(entry.path, unused):
                unused.add("image outside of train, val and test", "images outside of train, val and test", image)
    return {split: folder / name for split, name in splits.items()}
