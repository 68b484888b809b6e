"""The packed form: all encoded images of a split in one `.npz` file, read in place.

A pack is a folder with `train.npz`, and `val.npz` and `test.npz` where the source has such splits; `classes.txt`
(line k = name of label k, UTF-8, ended by a line feed) and `splits.txt` (the splits that belong to it, one a line; a
pack without it has train and test). Each `.npz` is an ordinary NumPy archive without pickles:

    jpeg     uint8 (bytes)   the encoded images (JPEG, PNG, ...), one after the other
    offsets  int64 (N + 1)   image i is jpeg[offsets[i] : offsets[i + 1]]
    labels   int64 (N)       0 .. classes - 1
    names    uint8 (bytes)   the images' names in UTF-8, each followed by a zero byte; a pack may lack it

`PackWriter` stores its members uncompressed, so that reading maps them where they lie inside the
zip file: a pack may be larger than memory. A compressed member is read into memory. What a file says of itself is
checked before memory is taken for it.
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

MEMBERS = ("jpeg", "offsets", "labels")
DTYPES = dict.fromkeys(("jpeg", "names"), np.dtype(np.uint8)) | dict.fromkeys(("offsets", "labels"), np.dtype(np.int64))
SPLITS = ("train", "val", "test")
UNPACKED = 2**26  # bytes that a compressed member may have however small it is; a larger one at most
EXPANSION = 20  # times what it takes in the file: images hardly shrink


class PackedSource:
    """One split of a pack. Raises ValueError naming the file and the defect if it is damaged.

    Args:
        bits: of the numbers in images of 16 bits, see `TaskSpec.bits`.
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
        if (falls := self.offsets[1:] <= self.offsets[:-1]).any():  # compared, for differences could overflow
            raise ValueError(f"{self.path}: offsets do not rise at image {np.argmax(falls)}")
        if self.names is not None and not len(set(self.names)) == len(self.names) == count:
            raise ValueError(f"{self.path}: {len(self.names)} names for {count} images, expected one for each")
        low, high = self.labels.min(), self.labels.max()
        if low < 0 or high >= len(self.class_names):
            raise ValueError(
                f"{self.path}: labels run from {low} to {high}, but classes.txt names {len(self.class_names)} classes"
            )


def open_pack(folder: Path, bits: int | None = None) -> TaskImages:
    """The splits of a pack, `bits` as in `PackedSource`."""
    if (folder / "splits.txt").is_file():
        names = read_lines(folder / "splits.txt", "split")
        if "train" not in names or set(names) - set(SPLITS):
            raise ValueError(f"{folder / 'splits.txt'}: {names}; expected train, and val and test if there are")
    else:
        names = ["train", "test"]
    sources = {name: PackedSource(folder / f"{name}.npz", bits) for name in names}
    return TaskImages(train=sources["train"], val=sources.get("val"), test=sources.get("test"), origin=f"pack {folder}")


class PackWriter:
    """Writes one `.npz` image by image; as a context manager it appears whole or not at all.

    The images go to a temporary file beside it first, because the archive states their total size
    before them; so writing needs no memory, and for a moment twice the space.
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
        """Add one image. `name`: of its own, for all images or for none."""
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
    """Write `classes.txt`. Raises ValueError for a name that is no line."""
    _write_lines(folder / "classes.txt", class_names)


def write_splits(folder: Path, splits: Sequence[str]) -> None:
    """Write `splits.txt`."""
    _write_lines(folder / "splits.txt", splits)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    for line in lines:
        if not line or "\n" in line or line[-1] == "\r":
            raise ValueError(f"class {line!r}: a pack names its classes one a line, and this is no line; rename it")
        if any("\ud800" <= letter <= "\udfff" for letter in line):
            raise ValueError(f"class {line!r}: its name is not UTF-8, as a pack writes it; rename it")
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def _join_names(names: list[str]) -> bytes:
    return b"".join(name.encode("utf-8", "surrogateescape") + b"\0" for name in names)


def _split_names(joined: np.ndarray) -> list[str]:
    return [name.decode("utf-8", "surrogateescape") for name in joined.tobytes().split(b"\0")[:-1]]


def encode(source: ImageSource, i: int, short_side: int, quality: int) -> bytes:
    """Image i as a pack holds it: small ones unchanged, larger ones shrunk to a JPEG.

    A file whose short side is at most `short_side` pixels keeps its bytes, pixels without a file
    become a PNG (lossless); anything larger is shrunk (bicubic) and saved with `quality` (1-95).
    """
    image = Image.fromarray(source.image(i))  # decoded in any case: a damaged file is refused here
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
    """Distinct names, one a line of UTF-8. `what`: a name is called."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a pack has a {what} a line there")
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
        raise ValueError(f"{path}: {len(names)} lines; expected one distinct {what} a line")
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
    except Exception as error:  # zipfile and NumPy raise nearly anything on what is damaged or forged
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: not a readable pack ({reason}); make it again") from error


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> np.ndarray:
    """A member, mapped where it lies if it is stored and large."""
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
            return array if name == "jpeg" else array.copy()  # writable, as torch wants labels
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
    if local[:4] != b"PK\x03\x04":
        raise ValueError(f"no zip header where {info.filename} should begin")
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    offset = info.header_offset + 30 + lengths + header
    return np.memmap(path, mode="r", dtype=DTYPES[name], shape=shape, offset=offset)


def _read_header(member: IO[bytes], dtype: np.dtype, name: str) -> tuple[tuple[int, ...], int]:
    """The shape that a `.npy` file states, and how many bytes its header takes. It has to be one list of `dtype`."""
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
