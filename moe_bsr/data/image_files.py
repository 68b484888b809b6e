"""Image files: decoding, and sources that are lists of files."""

import functools
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}


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
    """Images in files; `files` and `labels` are aligned, and `names` with them.

    Args:
        root: what the names of the images are relative to; a file that does not lie below it is named whole.
    """

    def __init__(self, files: list[Path], labels: np.ndarray, class_names: list[str], root: Path):
        self.files = files
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = class_names
        self.names: list[str] | None = [
            str(file).removeprefix(f"{root}{os.sep}").replace(os.sep, "/") for file in files
        ]

    @functools.cached_property
    def sizes(self) -> np.ndarray | None:
        """Bytes of each file, int64 (N,); -1 for a file that cannot be looked at."""
        return np.array([_size(file) for file in self.files], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, i: int) -> np.ndarray:
        return decode(self.files[i], str(self.files[i]))

    def encoded(self, i: int) -> bytes | None:
        return self.files[i].read_bytes()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


def is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.name[0] != "."
