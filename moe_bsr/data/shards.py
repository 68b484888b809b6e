"""Open tar shards: index each one once, and keep fetched images of remote shards on disk, up to a limit.

The cache folder holds an index for each shard, `NAME-HASH-HASH.json.gz`. The first hash is of its address and columns,
the second of its size and tag. For a remote shard there are two more files: `.bytes`, a sparse copy with the images
fetched so far, and `.seen`, their checksums. Images that were kept are never evicted, for the reason that
`DecodedCache` gives. If a server does not support byte ranges, the whole shard is downloaded and kept as `.tar`.
Several processes may share the folder.
"""

import contextlib
import fcntl
import gzip
import hashlib
import os
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moe_bsr.data.addresses import LocalFile, StoredFile, open_address
from moe_bsr.data.fetching import in_threads
from moe_bsr.data.tar_index import TarIndex, read_tar
from moe_bsr.runtime import files


class ShardCache:
    """Cache folder for indexes and fetched images.

    Args:
        most: limit in bytes of all fetched images and shards in the folder, which tasks may share.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self._used: int | None = None  # bytes in the folder when they were last counted
        self._added = 0  # bytes that this process has added since
        self._lock = threading.Lock()

    def reserve(self, size: int) -> bool:
        """Return whether `size` more bytes may be kept, and if so reserve them."""
        with self._lock:
            if self._used is None or self._added > self.most // 64:  # recounted, as other processes add images too
                self._used, self._added = self._count(), 0
            fits = self._used + self._added + size <= self.most
            self._added += size * fits
            return fits

    def stop_keeping(self, error: OSError) -> None:
        """Stop keeping images in this process, with a warning, because writing to the disk failed."""
        with self._lock:
            if self.most:
                warnings.warn(f"{self.folder}: no more images are kept: {files.reason(error)}", stacklevel=2)
            self.most = 0

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a lock of the folder, so that other processes wait."""
        with files.open_file(self.folder / "lock", "ab") as lock:
            with contextlib.suppress(OSError):  # on a file system without locks, work may be done twice
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _count(self) -> int:
        with os.scandir(self.folder) as found:
            return sum(e.stat().st_blocks * 512 for e in found if e.name.endswith((".bytes", ".tar")))


class Shard:
    """One opened shard, from which images are read by their index.

    Args:
        file: the tar file.
        stem: path of its files in the cache, without the ending.
    Attributes:
        sizes: size of each image in bytes, int64 (images,).
    """

    def __init__(self, file: StoredFile, stem: Path, index: TarIndex, cache: ShardCache) -> None:
        self.address, self._file, self._stem, self._cache = file.address, file, stem, cache
        self.sizes = np.array(index.sizes, dtype=np.int64)
        self._offsets = np.array(index.offsets, dtype=np.int64)
        self._keeps = not isinstance(file, LocalFile)
        self._seen: np.ndarray | None = None
        self._lock = threading.Lock()

    def read(self, place: int) -> bytes:
        """Return the encoded image at index `place`.

        Raises:
            LostData: the shard cannot be reached, or has changed since it was opened.
        """
        start, size = int(self._offsets[place]), int(self.sizes[place])
        if not size:
            return b""
        if not self._keeps:
            return self._file.read(start, size)
        if (kept := self._kept(place, start, size)) is not None:
            return kept
        content = self._file.read(start, size)
        if self._cache.reserve(size):
            try:
                self._keep(place, start, content)
            except OSError as error:
                self._cache.stop_keeping(error)
        return content

    def has(self, place: int) -> bool:
        """Return whether an image can be read from this machine's disk."""
        return not self._keeps or bool(self._checksums()[place])

    def _kept(self, place: int, start: int, size: int) -> bytes | None:
        checksum = int(self._checksums()[place])
        if not checksum:
            return None
        with contextlib.suppress(OSError), files.open_file(_beside(self._stem, ".bytes"), "rb") as kept:
            content = os.pread(kept.fileno(), size, start)
            return content if zlib.crc32(content) == checksum else None  # e.g. while another process writes it
        return None

    def _keep(self, place: int, start: int, content: bytes) -> None:
        with files.open_file(_beside(self._stem, ".bytes"), "r+b") as kept:
            if os.pwrite(kept.fileno(), content, start) == len(content):
                self._checksums()[place] = zlib.crc32(content)  # written last, so that a crash leaves no partial image

    def _checksums(self) -> np.ndarray:
        """Return the CRC-32 of each kept image, uint32 (images,), 0 for the others; mapped, so processes share it."""
        with self._lock:
            if self._seen is None:
                self._seen = self._map_checksums()
            return self._seen

    def _map_checksums(self) -> np.ndarray:
        place, length = _beside(self._stem, ".seen"), 4 * len(self.sizes)
        try:
            for file, size in ((_beside(self._stem, ".bytes"), 0), (place, length)):
                with files.open_file(file, "ab") as stream:
                    if os.fstat(stream.fileno()).st_size < size:
                        stream.truncate(size)
            return np.memmap(place, np.uint32, "r+", shape=self.sizes.shape)
        except OSError as error:
            self._cache.stop_keeping(error)
            return np.zeros(len(self.sizes), np.uint32)


def open_shards(
    addresses: Sequence[str], root: Path, cache: ShardCache, image_column: str | None, label_column: str | None
) -> list[tuple[Shard, TarIndex]]:
    """Open shards, and return each with its index, in the order of `addresses`.

    An index comes from the cache. If it is missing there, or is of another file, it is made now.

    Args:
        root: folder that relative paths start from.
        image_column, label_column: as in `read_tar`.
    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: a shard is damaged, or has to be downloaded as a whole and does not fit the cache.
        LostData: a shard cannot be reached.
        OSError: the cache cannot be written.
    """
    found = in_threads(lambda address: open_address(address, root), addresses)
    columns = f"{image_column}\n{label_column}"
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        with cache.locked():
            _require_space(found, columns, cache)
            return in_threads(lambda file: _open(file, columns, cache, image_column, label_column), found)
    except PermissionError as error:
        said = files.reason(error)
        raise OSError(f"{cache.folder}: {said}, or set another folder with the key cache of the task file") from error


def _open(
    file: StoredFile, columns: str, cache: ShardCache, image_column: str | None, label_column: str | None
) -> tuple[Shard, TarIndex]:
    stem = _stem(file, columns, cache)
    place, about = _beside(stem, ".json.gz"), {"address": file.address, "size": file.identity.size}
    index = None
    with contextlib.suppress(OSError, EOFError, zlib.error):
        index = TarIndex.read(gzip.decompress(files.read_bytes(place)), about)
    if index is None:
        for old in cache.folder.glob(f"{stem.name.rpartition('-')[0]}-*"):  # files of an earlier shard at this address
            files.remove(old)
    if not file.ranges:
        file = _fetched(file, _beside(stem, ".tar"))
    if index is None:
        index = read_tar(file, image_column, label_column)
        files.write_whole(place, gzip.compress(index.written(about).encode(), 1, mtime=0))
    return Shard(file, stem, index, cache), index


def _stem(file: StoredFile, columns: str, cache: ShardCache) -> Path:
    name = "".join(
        c if c.isalnum() and c.isascii() or c in "._" else "_" for c in file.address.rpartition("/")[2][-60:]
    )
    which = hashlib.sha256(f"{file.address}\n{columns}".encode("utf-8", "surrogateescape")).hexdigest()[:12]
    state = hashlib.sha256(repr(file.identity).encode()).hexdigest()[:12]
    return cache.folder / f"{name}-{which}-{state}"


def _beside(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def _require_space(found: list[StoredFile], columns: str, cache: ShardCache) -> None:
    """Raise ValueError if the shards that must be downloaded as a whole do not all fit the cache."""
    whole = [file for file in found if not file.ranges]
    missing = [file for file in whole if not _beside(_stem(file, columns, cache), ".tar").is_file()]
    needed = sum(file.identity.size for file in missing)
    if needed and not cache.reserve(needed):
        raise ValueError(
            f"{missing[0].address}: its server does not support byte ranges, so whole shards are kept, and "
            f"{len(missing)} of {needed / 1e9:.1f} GB do not fit: raise cache_gb = {cache.most / 1e9:g}, or choose "
            "another server"
        )


def _fetched(file: StoredFile, place: Path) -> LocalFile:
    """Download a shard to `place` if it is not there, and return that file under the shard's own address."""
    if files.kind(place) is None:
        partial = _beside(place, ".tmp")
        files.remove(partial)
        try:
            file.save(partial)
            partial.rename(place)
        finally:
            files.remove(partial)
    local = LocalFile(place)
    local.address = file.address
    return local
