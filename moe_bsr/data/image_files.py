"""Decode image files to RGB as a viewer would show them, and sources that are lists of files.

Transparent parts become white. Photos are rotated and mirrored as their EXIF orientation says. The first frame of an
animation is used.
"""

import contextlib
import functools
import io
import os
import re
import stat
import threading
from pathlib import Path

import numpy as np
from PIL import Image, JpegImagePlugin

from moe_bsr.data.formats import FORMATS, what_it_is
from moe_bsr.runtime.names import printable

MAX_PIXELS = 100_000_000  # decoding takes up to about 8 bytes per pixel
MAX_SIDE = 2**18  # pixels
LARGE = 2**24  # images of more pixels are decoded one at a time, however many threads there are
BAND = 2**22  # pixels converted to RGB at a time
DARK = 2**14  # if all values of a 16-bit image are below this, the value of white is unknown

# Programs that write these formats often set the fourth byte of every pixel to zero. Then it is not an alpha channel.
_UNSET_ALPHA = {"TGA", "BMP", "DIB"}

_large_images = threading.Lock()


class UnreadableImage(ValueError):
    """An image cannot be read. The message names the file."""


def decode(encoded: bytes | Path, name: str, bits: int | None = None) -> np.ndarray:
    """Decode an encoded image or image file to uint8 (H, W, 3).

    Args:
        name: name of the image in messages.
        bits: bit depth of the values in 16-bit images, see `TaskSpec.bits`.
    Raises:
        UnreadableImage: it cannot be read.
    """
    kind = file_kind(encoded) if isinstance(encoded, Path) else "file"
    if kind != "file":
        what = "no such file" if kind == "not there" else f"not a readable image (it is {kind})"
        raise UnreadableImage(printable(f"{name}: {what}"))
    try:
        try:
            return _decoded(encoded, bits)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
        return _decoded(_without_texts(encoded), bits)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise many kinds of exceptions on damaged files
        raise UnreadableImage(printable(f"{name}: not a readable image ({_reason(error, encoded)})")) from error


def _decoded(encoded: bytes | Path, bits: int | None) -> np.ndarray:
    with _opened(encoded) as image:
        pixels = image.width * image.height
        with _large_images if pixels > LARGE else contextlib.nullcontext():
            return rgb_pixels(image, bits)


def _without_texts(encoded: bytes | Path) -> bytes:
    """Return a PNG without its text chunks and color profile. Pillow refuses images in which these are large."""
    file = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
    kept, place = [file[:8]], 8
    while place < len(file):
        end = place + 12 + int.from_bytes(file[place : place + 4], "big")
        if file[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(file[place:end])
        place = end
    return b"".join(kept)


def rgb_pixels(image: Image.Image, bits: int | None = None) -> np.ndarray:
    """Return an opened image as uint8 (H, W, 3), with its EXIF orientation applied and transparent parts white.

    Raises:
        ValueError: the range of its pixel values is unknown.
    """
    raw = _raw_mode(image)
    image.load()
    orientation = image.getexif().get(0x0112, 1)
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I"):
        image = _eight_bits(image, bits)
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels are signed, 32-bit or floating-point numbers: convert it to 8 or 16 bits")
    elif ";16" in raw and image.format != "JPEG2000":  # Pillow keeps the high byte of each value
        top = max(int(np.max(image.getchannel(band).getextrema())) for band in range(3))
        if bits is not None and bits < 16 or bits is None and top < DARK >> 8:
            raise ValueError(
                f"only the upper 8 bits of 16-bit color are read, here at most {top}: convert it to 8 bits"
                + (", or write bits: 16 in the task file if it is just dark" if bits is None else "")
            )
    elif image.format in _UNSET_ALPHA and image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema() == (0, 0):
        image = image.convert(image.mode[:-1])
    key = image.info.get("transparency")
    if isinstance(key, tuple) and ";16" in raw:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif isinstance(key, int) and raw in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[raw]
    width, height = image.size
    rows = max(BAND // width, 1)
    if rows >= height:
        pixels = np.array(_on_white(image))
    else:
        pixels = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, rows):
            pixels[top : top + rows] = _on_white(image.crop((0, top, width, min(top + rows, height))))
    return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation in _UPRIGHT else pixels


_UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow cannot convert it to RGBA directly
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image, bits: int | None) -> Image.Image:
    """Convert 16-bit gray to 8-bit gray. A transparent value becomes an alpha channel."""
    values = np.asarray(image).astype(np.uint16)
    tags = getattr(image, "tag_v2", {})
    stated = tags.get(258, (16,))[0]  # BitsPerSample
    if stated < 16:
        bits = stated
    top = int(values.max())
    if bits is None and 0 < top < DARK:
        fits = next(n for n in (8, 10, 12, 14) if top < 1 << n)
        raise ValueError(
            f"its largest value is {top} of 65535, as if {fits}-bit values were stored in a 16-bit file: write bits: "
            f"{fits} in the task file, or bits: 16 if it is just dark"
        )
    bits = bits or 16
    if top >= 1 << bits:
        raise ValueError(f"its largest value is {top}, and the task file says bits: {bits}")
    scaled = (values // 257 if bits == 16 else values.astype(np.uint32) * 255 // ((1 << bits) - 1)).astype(np.uint8)
    if tags.get(262) == 0:  # PhotometricInterpretation 0: zero is white
        scaled = 255 - scaled
    gray = Image.fromarray(scaled)
    if isinstance(key := image.info.get("transparency"), int):
        gray.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return gray


def _raw_mode(image: Image.Image) -> str:
    """Return the pixel format of the file, in the names of Pillow's decoders; "" if the image is already loaded."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if found := next((each for each in arguments if isinstance(each, str)), None):
            return found
    return ""


def _opened(encoded: bytes | Path) -> Image.Image:
    """Open an image without decoding it. Raises ValueError if it is too large.

    A JPEG of up to 4 * MAX_PIXELS is set up to be decoded at half its size, if it is not progressive.
    """
    file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        if _start(encoded)[:3] != b"\xff\xd8\xff":
            raise ValueError(_too_large(int(re.findall(r"\d+", str(error))[0]))) from None
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
    pixels = image.width * image.height
    if MAX_PIXELS < pixels <= 4 * MAX_PIXELS and image.format in ("JPEG", "MPO") and "progressive" not in image.info:
        image.draft(None, (image.width // 2, image.height // 2))
    elif pixels > MAX_PIXELS:
        image.close()
        raise ValueError(_too_large(pixels))
    if max(image.size) > MAX_SIDE:
        image.close()
        raise ValueError(f"it is {image.width} x {image.height} pixels, and a side may have {MAX_SIDE} at most")
    return image


def _too_large(pixels: int) -> str:
    return f"it has {pixels / 1e6:.0f} megapixels, and at most {MAX_PIXELS // 10**6} are read: make it smaller"


def _start(encoded: bytes | Path) -> bytes:
    if isinstance(encoded, bytes):
        return encoded[:64]
    with open(encoded, "rb") as file:
        return file.read(64)


def _reason(error: Exception, encoded: bytes | Path) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return str(error)
    with contextlib.suppress(OSError):
        if what := what_it_is(_start(encoded)):
            return what
    if not isinstance(error, Image.UnidentifiedImageError):
        return str(error)
    known = _start(encoded).startswith((b"\x89PNG", b"GIF8")) or _start(encoded)[4:12] == b"ftypavif"
    return "its header is damaged, or it is cut off" if known else "its image format is unknown or not supported"


def file_kind(path: Path) -> str:
    """Return what is at a path, links followed: "file", or words such as "a folder" or "not there" for a message."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link that leads nowhere" if path.is_symlink() else "not there"
    except OSError as error:
        return f"not accessible: {error.strerror}"
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


class FileSource:
    """Source of images in files. `files`, `labels` and `names` are aligned.

    Args:
        labels: int64 (N,), indices into `class_names`.
        root: folder that the names of the images are relative to. An image elsewhere has its whole path as its name.
        bits: bit depth of the values in 16-bit images, see `TaskSpec.bits`.
    """

    def __init__(
        self, files: list[Path], labels: np.ndarray, class_names: list[str], root: Path, bits: int | None = None
    ):
        self.files = files
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = class_names
        self.bits = bits
        # A table may hold absolute paths although `root` is relative: both forms of the root are removed.
        roots = (f"{root}{os.sep}", f"{os.path.abspath(root)}{os.sep}")
        self.names: list[str] | None = [
            str(file).removeprefix(roots[0]).removeprefix(roots[1]).replace(os.sep, "/") for file in files
        ]

    @functools.cached_property
    def sizes(self) -> np.ndarray | None:
        """Size of each file in bytes, int64 (N,); -1 for a file whose size cannot be read."""
        return np.array([_size(file) for file in self.files], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, i: int) -> np.ndarray:
        return decode(self.files[i], str(self.files[i]), self.bits)

    def encoded(self, i: int) -> bytes | None:
        return self.files[i].read_bytes()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1
