"""Where images come from: torchvision's datasets, or any folder of images per class.

A source is any object with `labels` (int64 (N,)), `class_names` (list of str), `__len__` and
`image(i)`, which decodes image i to uint8 (H, W, 3) RGB; sizes may differ. A source that reads
files also has `encoded(i)`, the bytes of the file, or None where there is none. Packs are in
`packed.py`, drawn images in `generated.py`.
"""

import io
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image, ImageOps

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}

# dataset -> (splits torchvision knows, what it expects below the data root)
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


class UnreadableImage(ValueError):
    """The message names the file."""


def exif_rgb(image: Image.Image) -> Image.Image:
    """RGB, turned as its EXIF orientation says: as every viewer shows it.

    Raises ValueError for 32-bit and floating-point pixels, of which nobody knows what is white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit or floating-point numbers: convert it to 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow would cut them off at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def decode(encoded: bytes | Path, name: str) -> np.ndarray:
    """Decode an encoded image or image file to uint8 (H, W, 3).

    Raises UnreadableImage with `name` if it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            return np.array(exif_rgb(image))
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged files
        raise UnreadableImage(f"{name}: not a readable image ({error}); replace or remove it") from error


class FileSource:
    """Images in files; `files` and `labels` are aligned."""

    def __init__(self, files: list[Path], labels: np.ndarray, class_names: list[str]):
        self.files = files
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.files)

    def image(self, i: int) -> np.ndarray:
        return decode(self.files[i], str(self.files[i]))

    def encoded(self, i: int) -> bytes | None:
        return self.files[i].read_bytes()


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
            images = sorted(p for p in (folder / name).iterdir() if _is_image(p))
            if not images:
                raise ValueError(f"{folder / name}: no images ({', '.join(sorted(EXTENSIONS))})")
            files += images
            labels += [names.index(name)] * len(images)
        super().__init__(files, np.array(labels), list(names))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.name[0] != "."


class TorchvisionSource(FileSource):
    """One of `TORCHVISION` in its official layout below `root`, several splits one after the other.

    With `download`, torchvision fetches what is missing and checks its checksums. Raises ValueError
    for an unknown dataset or split, FileNotFoundError (with the place expected) for missing files.
    """

    def __init__(self, dataset: str, root: Path, splits: list[str], download: bool = False):
        if dataset not in TORCHVISION:
            raise ValueError(f"dataset: {dataset!r} is not one of {', '.join(TORCHVISION)}")
        parts = [_open_torchvision(dataset, root, split, download) for split in splits]
        labels = [getattr(part, "_labels", None) or part.targets for part in parts]
        images = [_images(part) for part in parts]
        super().__init__(
            [image for part in images for image in part],
            np.concatenate(labels),
            list(parts[0].classes),
        )
        if isinstance(self.files[0], Path):
            missing = [path for path in self.files if not path.exists()]
            if missing:
                raise FileNotFoundError(
                    f"{dataset}: {len(missing)} of {len(self.files)} images are missing, the first "
                    f"is {missing[0]}; remove {root / TORCHVISION[dataset][1].split('/')[0]} and "
                    "download or unpack it again"
                )

    def image(self, i: int) -> np.ndarray:
        image = self.files[i]
        return image if isinstance(image, np.ndarray) else super().image(i)

    def encoded(self, i: int) -> bytes | None:
        return None if isinstance(self.files[i], np.ndarray) else super().encoded(i)


def _open_torchvision(dataset: str, root: Path, split: str, download: bool):
    splits, layout = TORCHVISION[dataset]
    if split not in splits:
        raise ValueError(f"splits: {dataset} has no split {split!r}, it has {', '.join(splits)}")
    choice = {"train": split == "train"} if dataset.startswith("CIFAR") else {"split": split}
    try:
        return getattr(torchvision.datasets, dataset)(root, download=download, **choice)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{dataset} was not found in {root}: {error}\n"
            f"Expected {root}/{layout}. Either allow the download (data.download=true, "
            "or --download with pack.py; torchvision checks the checksums), or put the official "
            "files there."
        ) from error


def _images(part) -> list[Path] | np.ndarray:
    """The files of a torchvision dataset, or the arrays it holds.

    torchvision has no public name for the files; `part[i]` would decode without giving the bytes.
    """
    for name in ("_image_files", "_images", "data"):
        if hasattr(part, name):
            return getattr(part, name)
    raise TypeError(f"{type(part).__name__}: no list of images known for this torchvision version")
