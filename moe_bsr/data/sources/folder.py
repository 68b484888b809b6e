"""A user's own images: one folder per class."""

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
    "expected {0}/train/<class>/<image>.jpg (val/ and test/ beside train/ if there are) or {0}/<class>/<image>.jpg"
)


@SOURCES.register("folder")
@dataclass(frozen=True, kw_only=True)
class FolderTask(TaskSpec):
    """Folders of classes, or of splits with folders of classes; `path` is absolute, or below the data root.

    Splits are called train, val (valid, validation, dev) and test, in any case. A class has the images in its folder
    and all sub-folders.
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
    """A folder without any class folder that holds an image."""


class FolderSource(FileSource):
    """Images as `<folder>/<class>/**/*.jpg` (or png, webp, bmp, ...); labels follow the sorted names.

    Args:
        class_names: fixes the classes, for a test folder. It need not hold all of them, but an unknown one raises
            ValueError. Without, so does a class without images. A folder without classes always does.
        unused: where to count what is no image.
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
                raise ValueError(f"{entry.path!r}: no images of class {entry.name!r}; there is {what}")
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
    """The images of a val or test folder; None where there is no such folder, or no image in it."""
    try:
        return None if folder is None else FolderSource(folder, class_names, bits, unused)
    except NoImages:
        return None


def _splits(folder: Path, unused: Unused) -> dict[str, Path]:
    """The folders of the splits; of a plain folder of classes, itself as "train".

    A folder called train or test in which there are images and no folders is a class, or holds what has no labels.
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
            raise ValueError(f"{folder}: train folders lie within the classes; {EXPECTED.format(folder)}")
        if inner:
            raise ValueError(f"{folder}: {inner[0]!r} in it has a train folder of its own: name that one in path")
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
