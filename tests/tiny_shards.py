"""Tar shards in WebDataset's layout, and a server that can refuse byte ranges, return errors and stop answering."""

import contextlib
import http.server
import io
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

SIZE = 7  # images in a shard


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def shards_of(folder: Path, to: Path) -> int:
    """Write the images of a folder of classes, in order, to `to`-000.tar and so on. Returns the number of shards."""
    files = sorted(folder.glob("*/*"))
    parts = [files[start : start + SIZE] for start in range(0, len(files), SIZE)]
    for number, part in enumerate(parts):
        members = [
            member
            for file in part
            for member in (
                (file.relative_to(folder).as_posix(), file.read_bytes()),
                (file.relative_to(folder).with_suffix(".cls").as_posix(), file.parent.name.encode()),
            )
        ]
        write_shard(to.with_name(f"{to.name}-{number:03}.tar"), members)
    return len(parts)


class Server:
    """HTTP server for the files below a folder.

    Attributes:
        ranges: whether it supports byte ranges.
        alive: whether it answers at all.
        busy: number of requests that it first answers with status 503.
        asked: (path, range) of each request. credentials: the values of their Authorization header.
        sent: total bytes of the bodies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranges, self.alive, self.busy = folder, True, True, 0
        self.asked: list[tuple[str, str | None]] = []
        self.credentials: set[str | None] = set()
        self.sent = 0
        self.url = ""

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append((request.path, wanted))
        self.credentials.add(request.headers.get("Authorization"))
        if not self.alive:
            request.close_connection = True
            return
        if self.busy:
            self.busy -= 1
            return request.send_error(503)
        if request.path.startswith("/moved/"):
            request.send_response(302)
            request.send_header("Location", request.path.removeprefix("/moved"))
            request.send_header("Content-Length", "0")
            return request.end_headers()
        file = self.folder / request.path.lstrip("/")
        if not file.is_file():
            return request.send_error(404)
        body, size = file.read_bytes(), file.stat().st_size
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        request.send_response(206 if part and self.ranges else 200)
        if part and self.ranges:
            body = body[int(part[1]) : int(part[2]) + 1]
            request.send_header("Content-Range", f"bytes {part[1]}-{part[2]}/{size}")
        request.send_header("ETag", f'"{file.stat().st_mtime_ns}"')
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        with contextlib.suppress(OSError):  # a client that only needed the size has closed the connection
            request.wfile.write(body)
            self.sent += len(body)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Server]:
    server = Server(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

        def do_GET(self) -> None:
            server.answer(self)

        def log_message(self, *arguments) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()
