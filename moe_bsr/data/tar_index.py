"""Index a tar shard: read the offsets of its images, and their labels, without reading the images.

Shards have WebDataset's layout. Files whose names agree up to the first dot after the last slash form one sample, such
as `0017.jpg` and `0017.cls`. The label is in a `.cls`, `.json` or `.txt` file, or it is the name of the image's folder.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_bsr.data.addresses import StoredFile
from moe_bsr.data.class_folders import count_no_image, is_litter
from moe_bsr.data.class_names import LABEL_COLUMNS, composed
from moe_bsr.data.formats import EXTENSIONS
from moe_bsr.data.unused import Unused

FORMAT = 1  # version of a written index; an index of another version is made again
USUAL_LABELS = ("cls", "json", "txt")  # the first of these that a shard has is used
FOLDER = "folder"  # value of `column`: the folder of the image is the label
LABEL_BYTES = 2**20  # larger files with labels are ignored
IMAGE_BYTES = 2**29  # larger image files are not used
LEAST, MOST = 2**12, 2**22  # smallest and largest number of bytes to request at a time
NEAR = 2**15  # a gap of up to this many bytes counts as sequential reading

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_PARTS = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)


@dataclass
class TarIndex:
    """The samples of one shard, in the order of the shard.

    Attributes:
        column: where the labels are: cls, txt, json.FIELD, folder or another ending.
        names: names of the image files.
        offsets, sizes: position and size of each image in the shard, in bytes.
        labels: labels as text; "" for none.
        unused: arguments of `Unused.add` (one, many, example, what_to_do, count) for everything that is not used.
    """

    column: str
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    unused: list[tuple[str, str, str, str, int]] = field(default_factory=list)

    def written(self, about: dict[str, Any]) -> str:
        """Return the index as JSON text. `about` identifies the file that it was made from."""
        return json.dumps({"format": FORMAT, **about, **asdict(self)})

    @classmethod
    def read(cls, text: bytes, about: dict[str, Any]) -> "TarIndex | None":
        """Parse the result of `written`. Returns None if it is not a valid index, or if its `about` is different."""
        try:
            said = json.loads(text)
            if {key: said.pop(key) for key in ("format", *about)} != {"format": FORMAT, **about}:
                return None
            index = cls(**said)
            alike = len(index.names) == len(index.offsets) == len(index.sizes) == len(index.labels)
            return index if alike else None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def read_tar(file: StoredFile, image_column: str | None, label_column: str | None) -> TarIndex:
    """Make the index of a shard.

    Args:
        image_column: ending of the image files; None means any ending in `EXTENSIONS`.
        label_column: a value of `TarIndex.column`, or "json" for the first usual field name that occurs; None means the
            first of `USUAL_LABELS` that the shard has, or else the folder.
    Raises:
        ValueError: the file is not a tar file, or is compressed, damaged or cut off.
        LostData: it cannot be read.
    """
    unused = Unused()
    samples: dict[str, _Sample] = {}
    wanted = USUAL_LABELS if label_column is None else (_place(label_column)[0],)
    for member, tar in _members(file, unused):
        name = member.name.removeprefix("./")
        if member.isdir() or any(map(is_litter, name.split("/"))):
            continue
        parts = _PARTS.fullmatch(name)
        if not member.isreg() or member.sparse is not None:
            unused.add("member that is not a regular file", "members that are not regular files", name)
            continue
        key, ending = (parts[1], parts[2].lower()) if parts else (name, "")
        sample = samples.setdefault(key, _Sample())
        if ending == image_column or (image_column is None and f".{ending}" in EXTENSIONS):
            if member.size > IMAGE_BYTES:
                unused.add("image file of more than 512 MB", "image files of more than 512 MB", name)
            elif sample.name:
                unused.add(
                    "second image of a sample", "second images of samples", name, "image_column names one ending"
                )
            else:
                sample.name, sample.offset, sample.size = name, member.offset_data, member.size
        elif ending in wanted:
            content = tar.extractfile(member)
            if content is not None and member.size <= LABEL_BYTES:
                sample.labels.setdefault(ending, content.read())
        elif "." in ending and f".{ending.rpartition('.')[2]}" in EXTENSIONS:
            unused.add("image with dots in its ending", "images with dots in their endings", name,
                       "a sample's name ends at its first dot; image_column names such an ending")  # fmt: skip
        elif ending not in USUAL_LABELS:
            count_no_image(name, unused)
    return _labelled(samples, label_column, unused)


@dataclass
class _Sample:
    name: str = ""
    offset: int = 0
    size: int = 0
    labels: dict[str, bytes] = field(default_factory=dict)


def _labelled(samples: dict[str, _Sample], label_column: str | None, unused: Unused) -> TarIndex:
    """Decide where the labels are, and build the index."""
    found = [sample for sample in samples.values() if sample.name]
    if alone := [key for key, sample in samples.items() if not sample.name and sample.labels]:
        unused.add("label without an image", "labels without an image", alone[0], count=len(alone))
    column = label_column or next((c for c in USUAL_LABELS if any(c in s.labels for s in found)), FOLDER)
    ending, wanted = _place(column)
    fields: Sequence[str] = (wanted,) if wanted else LABEL_COLUMNS
    if ending == "json" and not wanted:
        said = (_fields(sample.labels.get("json", b"")) for sample in found)
        known = next((name for each in said for name in fields if name in each), None)
        fields, column = ((known,), f"json.{known}") if known else ((), column)
    index = TarIndex(column)
    for sample in found:
        if ending == FOLDER:
            label = composed(sample.name.rpartition("/")[0].rpartition("/")[2])
        elif ending == "json":
            value = next((_fields(sample.labels.get(ending, b"")).get(name) for name in fields), None)
            label = composed(str(value).strip()) if isinstance(value, str | int) else ""
        else:
            label = composed(sample.labels.get(ending, b"").decode("utf-8", "replace").strip())
        index.names.append(sample.name)
        index.offsets.append(sample.offset)
        index.sizes.append(sample.size)
        index.labels.append(label)
    index.unused = unused.counts()
    return index


def _place(column: str) -> tuple[str, str]:
    """Split a label column into the ending of its files and a field. Only "json" has fields; others may have dots."""
    ending, _, name = column.partition(".")
    return (ending, name) if ending == "json" else (column, "")


def _fields(content: bytes) -> dict[str, Any]:
    """Parse a JSON object; returns {} for anything else."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _members(file: StoredFile, unused: Unused) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield all members of a tar file.

    `tarfile` silently ends at a damaged header. So the end is checked here, and damage raises ValueError.
    """
    reader = _Reader(file)
    if reader.read(6).startswith(_COMPRESSED):
        raise ValueError(f"{file.address}: the tar file is compressed, so single images cannot be read: decompress it")
    reader.seek(0)
    try:
        with tarfile.open(fileobj=reader, mode="r:") as tar:
            while (member := tar.next()) is not None:
                yield member, tar
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every member in memory
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        cut = "end of data" in str(error)
        what = f"cut off: it ends after {file.identity.size} bytes" if cut else f"not a tar file, or damaged ({error})"
        raise ValueError(f"{file.address}: {what}; make or fetch it again") from error
    reader.seek(end)
    block = reader.read(tarfile.BLOCKSIZE)
    if not block:
        unused.add("tar file without an end mark", "tar files without an end mark", file.address, "cut off?")
    elif len(block) < tarfile.BLOCKSIZE or any(block):
        raise ValueError(f"{file.address}: damaged: no header at byte {end} of {file.identity.size}; make it again")


class _Reader(io.RawIOBase):
    """Seekable reader for `tarfile` that fetches few bytes per header.

    It reads windows of the file. They grow fourfold while reading is nearly sequential (small members), and are small
    again after a jump over a large member.
    """

    def __init__(self, file: StoredFile) -> None:
        self._file, self._place, self._start, self._window, self._size = file, 0, 0, b"", LEAST

    def tell(self) -> int:
        return self._place

    def seek(self, place: int, whence: int = 0) -> int:
        assert whence == 0
        self._place = place
        return place

    def read(self, size: int = -1) -> bytes:
        end = min(self._place + size, self._file.identity.size)
        if self._place >= end:
            return b""
        known = self._start + len(self._window)
        if not self._start <= self._place or end > known:
            near = self._start <= self._place <= known + max(NEAR, self._size)
            self._size = min(4 * self._size, MOST) if near else LEAST
            until = min(max(end, self._place + self._size), self._file.identity.size)
            self._start, self._window = self._place, self._file.read(self._place, until - self._place)
        part = self._window[self._place - self._start : end - self._start]
        self._place = end
        return part
