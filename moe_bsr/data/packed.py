"""Packs: all encoded images of a split in one `.npz` file, which is memory-mapped.

A pack is a folder with `train.npz`, with `val.npz` and `test.npz` if the source has these splits, with `classes.txt`
(line k is the name of label k, UTF-8, each line ends with a line feed) and with `splits.txt` (the splits of the pack,
one per line; a pack without this file has train and test). Each `.npz` is a NumPy archive without pickles:

    jpeg     uint8 (bytes)   the encoded images (JPEG, PNG, ...), one after the other
    offsets  int64 (N + 1)   image i is jpeg[offsets[i] : offsets[i + 1]]
    labels   int64 (N)       0 .. classes - 1
    names    uint8 (bytes)   the images' names in UTF-8, each followed by a zero byte; optional

`PackWriter` stores the members uncompressed, so that `jpeg` can be mapped at its place in the zip file: a pack may be
larger than memory. A compressed member is read into memory. The sizes that a file states are checked before memory is
allocated.
"""

import io
import math
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from moe_bsr.data.image_files import decode
from moe_bsr.data.spec import ImageSource, TaskImages
from moe_bsr.data.splits import SPLITS

MEMBERS = ("jpeg", "offsets", "labels")
DTYPES = dict.fromkeys(("jpeg", "names"), np.dtype(np.uint8)) | dict.fromkeys(("offsets", "labels"), np.dtype(np.int64))
# A compressed member may unpack to UNPACKED bytes, or to EXPANSION times its size in the file (images hardly shrink).
UNPACKED = 2**26
EXPANSION = 20


class PackedSource:
    """Source of the images in one split of a pack.

    Args:
        bits: bit depth of the values in 16-bit images, see `TaskSpec.bits`.
    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged. The message names the file and the defect.
    """

    def __init__(self, path: Path, bits: int | None = None):
        self.path, self.bits = path, bits
        self.class_names = read_lines(path.parent / "classes.txt", "class name")
        members = _read_members(path)
        self.jpeg, self.offsets, self.labels = (members[name] for name in MEMBERS)
        self.names = _split_names(members["names"]) if "names" in members else None
        self._check()
        self.sizes = np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> np.ndarray:
        name = f"image {i}" if self.names is None else f"image {i} ({self.names[i]})"
        return decode(self.encoded(i), f"{name} of {self.path}", self.bits)

    def encoded(self, i: int) -> bytes:
        return self.jpeg[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def _check(self) -> None:
        count = len(self.labels)
        if count == 0:
            raise ValueError(f"{self.path}: no images")
        if len(self.offsets) != count + 1:
            raise ValueError(f"{self.path}: {len(self.offsets)} offsets for {count} labels, expected {count + 1}")
        if self.offsets[0] != 0 or self.offsets[-1] > len(self.jpeg):
            raise ValueError(
                f"{self.path}: offsets run from {self.offsets[0]} to {self.offsets[-1]}, outside "
                f"the data (0 to {len(self.jpeg)}); is the file cut off?"
            )
        if (falls := self.offsets[1:] <= self.offsets[:-1]).any():  # np.diff could overflow
            raise ValueError(f"{self.path}: offsets do not rise at image {np.argmax(falls)}")
        if self.names is not None and not len(set(self.names)) == len(self.names) == count:
            raise ValueError(f"{self.path}: {len(self.names)} names for {count} images, expected one for each")
        low, high = self.labels.min(), self.labels.max()
        if low < 0 or high >= len(self.class_names):
            raise ValueError(
                f"{self.path}: labels run from {low} to {high}, but classes.txt names {len(self.class_names)} classes"
            )


def open_pack(folder: Path, bits: int | None = None) -> TaskImages:
    """Open all splits of a pack. `bits` and errors are those of `PackedSource`."""
    if (folder / "splits.txt").is_file():
        names = read_lines(folder / "splits.txt", "split")
        if "train" not in names or set(names) - set(SPLITS):
            raise ValueError(f"{folder / 'splits.txt'}: {names}; expected train, and val and test if the pack has them")
    else:
        names = ["train", "test"]
    sources = {name: PackedSource(folder / f"{name}.npz", bits) for name in names}
    return TaskImages(train=sources["train"], val=sources.get("val"), test=sources.get("test"), origin=f"pack {folder}")


class PackWriter:
    """Context manager that writes one `.npz` image by image. If an exception occurs, no file is left.

    The images are first written to a temporary file in the same folder, because the archive states their total size
    before them. So the images need no memory, but twice the disk space for a moment.
    """

    def __init__(self, path: Path):
        self.path = path
        self._images = path.with_suffix(".images.tmp")
        self._offsets: list[int] = [0]
        self._labels: list[int] = []
        self._names: list[str] = []

    def __enter__(self) -> "PackWriter":
        self._file = open(self._images, "wb")
        return self

    def add(self, encoded: bytes, label: int, name: str | None = None) -> None:
        """Add one image. Either all images have a `name`, each a different one, or none has."""
        self._file.write(encoded)
        if name is not None:
            self._names.append(name)
        self._offsets.append(self._offsets[-1] + len(encoded))
        self._labels.append(label)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._file.close()
        partial = self.path.with_suffix(".npz.tmp")
        try:
            if kind is None:
                self._assemble(partial)
                os.replace(partial, self.path)
        finally:
            self._images.unlink()
            partial.unlink(missing_ok=True)

    def _assemble(self, partial: Path) -> None:
        with open(partial, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                with archive.open("jpeg.npy", "w", force_zip64=True) as member:
                    shape = (self._offsets[-1],)
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    npy.write_array_header_1_0(member, header)
                    with open(self._images, "rb") as images:
                        shutil.copyfileobj(images, member, 1 << 20)
                arrays = {"offsets": np.array(self._offsets, np.int64), "labels": np.array(self._labels, np.int64)}
                if self._names:
                    arrays["names"] = np.frombuffer(_join_names(self._names), np.uint8)
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        npy.write_array(member, array)
            file.flush()
            os.fsync(file.fileno())


def write_classes(folder: Path, class_names: Sequence[str]) -> None:
    """Write `classes.txt`. Raises ValueError for a name that is empty, contains a line break or is not UTF-8."""
    _write_lines(folder / "classes.txt", class_names)


def write_splits(folder: Path, splits: Sequence[str]) -> None:
    """Write `splits.txt`."""
    _write_lines(folder / "splits.txt", splits)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    for line in lines:
        if not line or "\n" in line or line[-1] == "\r":
            raise ValueError(f"class {line!r}: a pack has one name per line, without line breaks; rename it")
        if any("\ud800" <= letter <= "\udfff" for letter in line):
            raise ValueError(f"class {line!r}: a pack stores names in UTF-8, and this one cannot be encoded; rename it")
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def _join_names(names: list[str]) -> bytes:
    return b"".join(name.encode("utf-8", "surrogateescape") + b"\0" for name in names)


def _split_names(joined: np.ndarray) -> list[str]:
    return [name.decode("utf-8", "surrogateescape") for name in joined.tobytes().split(b"\0")[:-1]]


def encode(source: ImageSource, i: int, short_side: int, quality: int) -> bytes:
    """Encode image i for a pack.

    An image whose short side is at most `short_side` pixels keeps the bytes of its file, or becomes a PNG (lossless)
    if there is no file. A larger image is resized (bicubic) and saved as a JPEG of this `quality` (1-95).
    """
    image = Image.fromarray(source.image(i))  # always decoded, so that a damaged file is noticed here
    scale = short_side / min(image.size)
    if scale >= 1 and (encoded := getattr(source, "encoded", lambda i: None)(i)) is not None:
        return encoded
    buffer = io.BytesIO()
    if scale >= 1:
        image.save(buffer, "PNG")
    else:
        size = [max(short_side, round(side * scale)) for side in image.size]
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def read_lines(path: Path, what: str) -> list[str]:
    """Read distinct names from a UTF-8 file, one per line. `what` says in messages what a name is."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a pack has one {what} per line there")
    text = path.read_bytes()
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}: not UTF-8 but UTF-16; save it as UTF-8")
    lines = text.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    if all(line.endswith(b"\r") for line in lines[:-1]) and len(lines) > 1:  # an editor on Windows saved it
        lines = [line.removesuffix(b"\r") for line in lines]
    try:
        names = [line.decode("utf-8") for line in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.object[error.start]:#x}); save it as UTF-8") from None
    if len(set(names)) != len(names) or not all(names):
        raise ValueError(f"{path}: {len(names)} lines; expected one {what} per line, all different and none empty")
    return names


def _read_members(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such pack")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if missing := [name for name in MEMBERS if name not in members]:
                raise ValueError(f"no member {missing[0]!r}, it holds {', '.join(members)}")
            return {
                name: _read_member(path, archive, members[name], name)
                for name in (*MEMBERS, *({"names"} & members.keys()))
            }
    except Exception as error:  # zipfile and NumPy raise many kinds of exceptions on damaged or forged files
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: not a readable pack ({reason}); make it again") from error


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> np.ndarray:
    """Return a member of the archive. An uncompressed `jpeg` is memory-mapped, the others are read."""
    if info.flag_bits & 1:
        raise ValueError(f"{info.filename} is encrypted")
    stored = info.compress_type == zipfile.ZIP_STORED
    if not stored and info.file_size > max(UNPACKED, EXPANSION * info.compress_size):
        raise ValueError(f"{info.filename} would take {info.file_size} bytes, unpacked from {info.compress_size}")
    with archive.open(info) as member:
        shape, header = _read_header(member, DTYPES[name], info.filename)
        if header + math.prod(shape) * DTYPES[name].itemsize != info.file_size:
            raise ValueError(f"{info.filename} does not have the size its header states")
        if not stored or name != "jpeg":
            content = member.read(info.file_size)
            if member.read(1) or len(content) + header != info.file_size:
                raise ValueError(f"{info.filename} does not have the size the archive states")
            array = np.frombuffer(content, DTYPES[name])
            return array if name == "jpeg" else array.copy()  # torch.from_numpy needs writable labels
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
    if local[:4] != b"PK\x03\x04":
        raise ValueError(f"no zip header where {info.filename} should begin")
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    offset = info.header_offset + 30 + lengths + header
    return np.memmap(path, mode="r", dtype=DTYPES[name], shape=shape, offset=offset)


def _read_header(member: IO[bytes], dtype: np.dtype, name: str) -> tuple[tuple[int, ...], int]:
    """Read the header of a `.npy` file: its shape, and the length of the header in bytes.

    Raises ValueError unless the array is one-dimensional and of type `dtype`.
    """
    version = npy.read_magic(member)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"{name} has NumPy format {version}, expected 1.0 or 2.0")
    shape, _, found = read_header[version](member)
    if found.hasobject:
        raise ValueError(f"{name} holds Python objects, which are never unpickled (allow_pickle=False)")
    if found != dtype or len(shape) != 1 or shape[0] < 0:
        label = name.removesuffix(".npy")
        raise ValueError(f"{label} is {found} {shape}, expected {dtype} in one dimension")
    return shape, member.tell()
