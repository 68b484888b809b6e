"""The packed form: all encoded images of a split in one `.npz` file, read in place.

A pack is a folder with `train.npz`, `test.npz` and `classes.txt` (line k = name of label k, UTF-8).
Each `.npz` is an ordinary NumPy archive without pickles:

    jpeg     uint8 (bytes)   the encoded images (JPEG, PNG, ...), one after the other
    offsets  int64 (N + 1)   image i is jpeg[offsets[i] : offsets[i + 1]]
    labels   int64 (N)       0 .. classes - 1
    names    uint8 (bytes)   the images' names in UTF-8, each followed by a zero byte; a pack may lack it

`PackWriter` stores its members uncompressed, so that reading maps them where they lie inside the
zip file: a pack may be larger than memory. A compressed member is read into memory.
"""

import io
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from moe_bsr.data.image_files import decode
from moe_bsr.data.spec import ImageSource, TaskImages

MEMBERS = ("jpeg", "offsets", "labels")


class PackedSource:
    """One split of a pack. Raises ValueError naming the file and the defect if it is damaged."""

    def __init__(self, path: Path):
        self.path = path
        self.class_names = _read_classes(path.parent / "classes.txt")
        members = _read_members(path)
        self.jpeg, self.offsets, self.labels = (members[name] for name in MEMBERS)
        self.names = _split_names(members["names"]) if "names" in members else None
        self._check()
        self.sizes = np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> np.ndarray:
        return decode(self.encoded(i), f"image {i} of {self.path}")

    def encoded(self, i: int) -> bytes:
        return self.jpeg[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def _check(self) -> None:
        for name, dtype in zip(MEMBERS, (np.uint8, np.int64, np.int64), strict=True):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1:
                raise ValueError(
                    f"{self.path}: {name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} in one dimension"
                )
        count, sizes = len(self.labels), np.diff(self.offsets)
        if count == 0:
            raise ValueError(f"{self.path}: no images")
        if len(self.offsets) != count + 1:
            raise ValueError(f"{self.path}: {len(self.offsets)} offsets for {count} labels, expected {count + 1}")
        if self.offsets[0] != 0 or self.offsets[-1] > len(self.jpeg):
            raise ValueError(
                f"{self.path}: offsets run from {self.offsets[0]} to {self.offsets[-1]}, outside "
                f"the data (0 to {len(self.jpeg)}); is the file cut off?"
            )
        if (sizes <= 0).any():
            raise ValueError(f"{self.path}: offsets do not rise at image {np.argmax(sizes <= 0)}")
        if self.names is not None and not len(set(self.names)) == len(self.names) == count:
            raise ValueError(f"{self.path}: {len(self.names)} names for {count} images, expected one for each")
        low, high = self.labels.min(), self.labels.max()
        if low < 0 or high >= len(self.class_names):
            raise ValueError(
                f"{self.path}: labels run from {low} to {high}, but classes.txt names {len(self.class_names)} classes"
            )


def open_pack(folder: Path) -> TaskImages:
    """The splits of a pack."""
    train, test = (PackedSource(folder / f"{split}.npz") for split in ("train", "test"))
    return TaskImages(train=train, test=test, origin=f"pack {folder}")


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


def write_classes(folder: Path, class_names: list[str]) -> None:
    (folder / "classes.txt").write_text("".join(f"{n}\n" for n in class_names), encoding="utf-8")


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


def _read_classes(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a pack names its classes there, one a line")
    names = path.read_text(encoding="utf-8").splitlines()
    if not names or len(set(names)) != len(names) or not all(names):
        raise ValueError(f"{path}: {len(names)} lines; expected one distinct class name a line")
    return names


def _read_members(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such pack")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if missing := [name for name in MEMBERS if name not in members]:
                raise ValueError(f"no member {missing[0]!r}, it holds {', '.join(members)}")
            arrays: dict[str, np.ndarray] = {}
            for name in (*MEMBERS, *({"names"} & members.keys())):
                if name == "jpeg" and members[name].compress_type == zipfile.ZIP_STORED:
                    arrays[name] = _map_member(path, members[name])
                else:
                    with archive.open(members[name]) as member:
                        arrays[name] = npy.read_array(member, allow_pickle=False)
            return arrays
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a readable pack ({error}); make it again") from error


def _map_member(path: Path, info: zipfile.ZipInfo) -> np.memmap:
    """A stored `.npy` member, mapped where it lies: after its local zip header and NumPy header."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
        if local[:4] != b"PK\x03\x04":
            raise ValueError(f"no zip header where {info.filename} should begin")
        lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        start = info.header_offset + 30 + lengths
        file.seek(start)
        version = npy.read_magic(file)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"{info.filename} has NumPy format {version}, expected 1.0 or 2.0")
        shape, _, dtype = read_header[version](file)
        offset = file.tell()
    if offset + int(np.prod(shape)) * dtype.itemsize != start + info.file_size:
        raise ValueError(f"{info.filename} does not have the size its header states")
    return np.memmap(path, mode="r", dtype=dtype, shape=shape, offset=offset)
