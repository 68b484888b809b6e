"""Read byte ranges of files by address: a local path, an http(s) URL, or any URL that fsspec supports (s3://, gs://).

`hf://datasets/OWNER/NAME/FILE` is a file of a dataset on the Hugging Face Hub. It is read with the token of the
logged-in user. An opened file is identified by its size and a tag (ETag or modification time). If another file later
appears at the same address, reading raises LostData instead of returning its bytes.
"""

import os
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from moe_bsr.data.image_files import file_kind
from moe_bsr.runtime import files

CONNECTIONS = 16  # concurrent requests
TRIES = 5
WAIT = 0.5  # seconds before the second try; the wait doubles before each further one
TIMEOUT = 30.0  # seconds to wait for a connection, or for the next bytes
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP status codes of temporary failures, which are tried again
BLOCK = 2**20  # bytes per write while a whole file is downloaded

Value = TypeVar("Value")


class LostData(OSError):
    """A file that images are read from cannot be reached, or has changed since it was opened. The message names it."""


@dataclass(frozen=True)
class Identity:
    """Identity of a file's contents: the size in bytes, and a tag that changes with them ("" if there is none)."""

    size: int
    tag: str

    def is_still(self, now: "Identity") -> bool:
        return self.size == now.size and (self.tag == now.tag or "" in (self.tag, now.tag))


class StoredFile(Protocol):
    """A file, readable as long as it is the one that was opened.

    Attributes:
        address: the address as given; a local path is absolute.
        ranges: whether byte ranges can be read. If not, the whole file has to be downloaded (`save`).
    """

    address: str
    identity: Identity
    ranges: bool

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from offset `start` on. Raises LostData."""
        ...

    def save(self, place: Path) -> None:
        """Write the whole contents to a new file. Raises LostData, or OSError if the disk fails."""
        ...


def open_address(address: str, root: Path) -> StoredFile:
    """Open the file at an address.

    Args:
        root: folder that relative paths start from.
    Raises:
        FileNotFoundError: there is no such file.
        LostData: it cannot be reached.
        ValueError: the address is malformed or of an unknown kind.
    """
    kind = address.partition("://")[0] if is_remote(address) else ""
    if not kind:
        return LocalFile(Path(os.path.abspath(root / Path(address).expanduser())))
    if kind in ("http", "https"):
        return HttpFile(address)
    return _of_hub(address) if kind == "hf" else FsspecFile(address)


def is_remote(address: str) -> bool:
    return "://" in address


class LocalFile:
    """A file on this machine."""

    ranges = True

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)
        if (kind := file_kind(path)) != "file":
            raise FileNotFoundError(f"{path}: {'no such file' if kind == 'not there' else f'it is {kind}'}")
        self.identity = _identity(os.stat(path))

    def read(self, start: int, size: int) -> bytes:
        try:
            with open(self.path, "rb", buffering=0) as file:
                now = _identity(os.fstat(file.fileno()))
                if not self.identity.is_still(now):
                    raise _changed(self.address, self.identity, now)
                return _whole(os.pread(file.fileno(), size, start), size)
        except LostData:
            raise
        except OSError as error:
            raise LostData(f"{self.path}: {files.reason(error)}") from error

    def save(self, place: Path) -> None:
        raise NotImplementedError  # never needed: byte ranges can be read


class HttpFile:
    """A file at a URL.

    Args:
        address: name of the file in messages; None means the URL.
        token: bearer token for this server. It is not sent to servers that this one redirects to.
    """

    def __init__(self, url: str, address: str | None = None, token: str | None = None) -> None:
        self.url, self.address = url, address or url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        if urlsplit(url).username is not None:
            raise ValueError(f"{url}: a user name or password in a URL is not supported; use s3://, gs:// or hf://")
        self.ranges, self.identity = self._get(0, 1, lambda answer: (answer.status == 206, _stated(url, answer)))

    def read(self, start: int, size: int) -> bytes:
        def part(answer: Any) -> bytes:
            if answer.status != 206:  # else the whole file would be read into memory
                raise ConnectionError("the server does not send byte ranges any more")
            return _whole(self._same(answer).read(), size)

        return self._get(start, size, part)

    def save(self, place: Path) -> None:
        def write(answer: Any) -> None:
            with open(place, "wb") as file:
                for block in self._same(answer).stream(BLOCK):
                    file.write(block)
                _whole(range(file.tell()), self.identity.size)

        self._get(0, 0, write)

    def _same(self, answer: Any) -> Any:
        """Return the response if it is about the file that was opened. Raises LostData otherwise."""
        if not self.identity.is_still(now := _stated(self.address, answer)):
            raise _changed(self.address, self.identity, now)
        return answer

    def _get(self, start: int, size: int, use: Callable[[Any], Value]) -> Value:
        """Send a GET request for `size` bytes from `start` on (size 0: the whole file), and return `use(response)`.

        `use` gets the response before its body is read. Temporary failures are tried again, those within `use` too.
        """
        from urllib3.exceptions import HTTPError

        wanted = {"Range": f"bytes={start}-{start + size - 1}"} if size else {}
        for tried in range(TRIES):
            time.sleep(WAIT * 2 ** (tried - 1) if tried else 0)
            answer = None
            try:
                answer = _ask(self.url, self._headers | wanted)
                if answer.status in (200, 206):
                    return use(answer)
                said = f"the server answers {answer.status} {answer.reason}"
                if answer.status not in PASSING:
                    missing = answer.status in (404, 410)
                    raise (FileNotFoundError if missing else LostData)(f"{self.address}: {said}")
            except (HTTPError, ConnectionError) as error:
                said = _reason(error)
            finally:
                if answer is not None:
                    answer.close()  # closes the connection as well, unless the body was read completely
        raise LostData(f"{self.address}: {said}, tried {TRIES} times")


class FsspecFile:
    """A file read through the package `fsspec`, with the storage package and credentials that fsspec finds."""

    ranges = True

    def __init__(self, address: str) -> None:
        import fsspec

        self.address = address
        try:
            self._system, self._path = fsspec.url_to_fs(address)
            size, tag = self._system.info(self._path)["size"], self._system.ukey(self._path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{address}: no such file") from None
        except (ImportError, ValueError) as error:  # fsspec's message says what to install
            raise ValueError(f"{address}: {error}") from error
        except Exception as error:  # each storage's library has exceptions of its own
            raise LostData(f"{address}: {_reason(error)}") from error
        self.identity = Identity(int(size), str(tag))

    def read(self, start: int, size: int) -> bytes:
        try:
            return _whole(self._system.cat_file(self._path, start, start + size), size)
        except LostData:
            raise
        except Exception as error:
            raise LostData(f"{self.address}: {_reason(error)}") from error

    def save(self, place: Path) -> None:
        raise NotImplementedError  # never needed: byte ranges can be read


def _of_hub(address: str) -> StoredFile:
    """Open `hf://datasets/OWNER/NAME[@REVISION]/FILE`."""
    import huggingface_hub

    parts = address.removeprefix("hf://").split("/", 3)
    if len(parts) < 4 or parts[0] != "datasets":
        raise ValueError(f"{address}: expected hf://datasets/OWNER/NAME/FILE")
    name, _, revision = parts[2].partition("@")
    url = huggingface_hub.hf_hub_url(f"{parts[1]}/{name}", parts[3], repo_type="dataset", revision=revision or None)
    return HttpFile(url, address, huggingface_hub.get_token())


def _ask(url: str, headers: dict[str, str]) -> Any:
    import urllib3

    place = urlsplit(url)
    proxy = urllib.request.getproxies().get(place.scheme)
    if proxy and urllib.request.proxy_bypass(place.hostname or ""):
        proxy = None
    once = urllib3.Retry(None, connect=0, read=0, redirect=5, status=0, other=0)
    pool = _pool(os.getpid(), proxy)
    return pool.request("GET", url, headers=headers, preload_content=False, decode_content=False, retries=once)


@cache
def _pool(process: int, proxy: str | None) -> Any:
    """Return this process's pool of open connections. `process` keeps a fork from using its parent's pool."""
    import urllib3

    size: dict[str, Any] = {"maxsize": CONNECTIONS, "timeout": urllib3.Timeout(TIMEOUT)}
    return urllib3.PoolManager(**size) if proxy is None else urllib3.ProxyManager(proxy, **size)


def _stated(address: str, answer: Any) -> Identity:
    """Return the identity of the whole file as a response states it, for responses with a byte range too."""
    headers = answer.headers
    size = (
        headers.get("Content-Range", "").rpartition("/")[2] if answer.status == 206 else headers.get("Content-Length")
    )
    if size is None or not size.isdecimal():
        raise LostData(f"{address}: the server does not say how many bytes the file has")
    tag = headers.get("ETag", "")
    return Identity(int(size), headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag)


def _identity(about: os.stat_result) -> Identity:
    return Identity(about.st_size, str(about.st_mtime_ns))


def _changed(address: str, then: Identity, now: Identity) -> LostData:
    sizes = f"{then.size} bytes then, {now.size} now" if then.size != now.size else "its size is the same"
    return LostData(f"{address}: the file has changed since it was opened ({sizes}); start again to read the new one")


def _whole(content: Any, size: int) -> Any:
    """Return `content` if it has `size` bytes. Raises ConnectionError otherwise."""
    if len(content) != size:
        raise ConnectionError(f"it ends after {len(content)} of {size} bytes")
    return content


def _reason(error: BaseException) -> str:
    """Return the message of the innermost error in a chain, in one line."""
    while isinstance(inner := getattr(error, "reason", None) or error.__cause__, BaseException):
        error = inner
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join((said.rpartition("] ")[2] or type(error).__name__).split())
