"""A user's own images: one folder per class."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_bsr.data.image_files import EXTENSIONS, FileSource, is_image
from moe_bsr.data.spec import SOURCES, TaskImages, TaskSpec


@SOURCES.register("folder")
@dataclass(frozen=True, kw_only=True)
class FolderTask(TaskSpec):
    """`<path>/train/<class>/*.jpg` and `<path>/test/<class>/*.jpg`; `path` is absolute, or below the data root."""

    path: str

    def folder(self, root: Path) -> Path:
        return root / Path(self.path).expanduser()

    def open(self, root: Path, download: bool = False) -> TaskImages:
        folder = self.folder(root)
        for split in ("train", "test"):
            if not (folder / split).is_dir():
                raise FileNotFoundError(
                    f"{folder / split}: missing; expected {folder}/train/<class>/<image>.jpg and "
                    f"{folder}/test/<class>/<image>.jpg (validation images are taken from train, "
                    "test images must be set aside by hand)"
                )
        train = FolderSource(folder / "train")
        test = FolderSource(folder / "test", train.class_names)
        return TaskImages(train=train, test=test, origin=f"folder {folder}")


class FolderSource(FileSource):
    """Images as `<folder>/<class>/*.jpg` (or png, webp, bmp, ...); labels follow the sorted names.

    `class_names` fixes the classes, for a test folder: it need not hold all of them, but an unknown
    one raises ValueError, as does a folder without classes or a class without images.
    """

    def __init__(self, folder: Path, class_names: list[str] | None = None):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected one folder of images per class below it")
        found = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
        if not found:
            raise ValueError(f"{folder}: no class folders; expected {folder}/<class>/<image>.jpg")
        names = found if class_names is None else class_names
        if unknown := sorted(set(found) - set(names)):
            raise ValueError(
                f"{folder}: class folder {unknown[0]!r} is not among the {len(names)} classes of "
                "the training folder; remove it, or add training images for it"
            )
        files, labels = [], []
        for name in found:
            images = sorted(p for p in (folder / name).iterdir() if is_image(p))
            if not images:
                raise ValueError(f"{folder / name}: no images ({', '.join(sorted(EXTENSIONS))})")
            files += images
            labels += [names.index(name)] * len(images)
        super().__init__(files, np.array(labels), list(names), folder)
