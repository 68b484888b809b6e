"""Cases for `hostile`: images, names of classes and tasks, and run folders made by an attacker."""

import json
import os
import pickle
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from moe_bsr.selftest.hostile_parts import (
    Case,
    Content,
    Payload,
    encoded,
    folder_config,
    folder_task,
    made,
    override_case,
    train_command,
)


def _png_header(width: int, height: int) -> bytes:
    """Return a PNG file that claims a size and has no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def images(rng: random.Random) -> Iterator[Case]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    jpeg, png = encoded(noise, "JPEG"), encoded(noise, "PNG")
    files = {
        "empty.png": b"",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "flipped.png": png[:100] + bytes([png[100] ^ 255]) + png[101:],
        "random.jpg": rng.randbytes(3000),
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file\nshowpage\n",
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "page.jpg": b"<!DOCTYPE html><html></html>",
        "huge header.png": _png_header(100_000, 100_000),
        "bomb.png": lambda: encoded(Image.new("L", (13_000, 13_000)), "PNG"),
        "wide.png": encoded(Image.new("RGB", (60_000, 1), "red"), "PNG"),
        "tall.png": encoded(Image.new("RGB", (1, 60_000), "red"), "PNG"),
        "frames.gif": lambda: encoded(
            noise, "GIF", save_all=True, append_images=[noise.rotate(3 * n) for n in range(100)]
        ),
        "one pixel.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "text.png": _png_with_text(png, b"x" * 2_000_000),
        "float.tif": encoded(Image.new("F", (30, 30), 0.5), "TIFF"),
        "clear.png": encoded(Image.new("RGBA", (30, 30), (0, 0, 0, 0)), "PNG"),
        "pickle.png": pickle.dumps(Payload()),
        "\x1b]0;x\x07.png": b"broken",
        "new\nline.png": b"broken",
        "a\u202egnp.png": b"broken",
    }  # fmt: skip
    for name, content in files.items():
        for command in ("train", "check", "predict", "pack"):
            yield f"images: {name!r} in {command}", _image_case(name, content, command)
    for kind in ("FIFO", "device", "folder", "broken link", "link to itself", "socket", "no permission"):
        for command in ("train", "check", "predict"):
            yield f"images: {kind} in {command}", _image_case("x.png", kind, command)


def _png_with_text(png: bytes, text: bytes) -> bytes:
    body = b"zTXtcomment\0\0" + zlib.compress(text)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:33] + chunk + png[33:]


def _image_case(name: str, content: Content | str, command: str) -> Callable[[Path], list[str]]:
    def prepare(place: Path) -> list[str]:
        folder_task(place)
        image = place / "photos/train/ant" / name
        if isinstance(content, str):
            _special(image, content)
        else:
            image.write_bytes(made(content))
        if command == "predict":
            return ["predict", "no-run", str(image.relative_to(place))]
        if command in ("check", "pack"):
            return [command, "photos.yaml", "--root", "."]
        return ["train", folder_config(place), "--run", "run"]

    return prepare


def _special(path: Path, kind: str) -> None:
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "socket":
        old = os.getcwd()
        os.chdir(path.parent)  # the address has a short limit
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(old)
    else:
        path.write_bytes(b"x")
        path.chmod(0)


def names() -> Iterator[Case]:
    markup = ["$$", "$\\frac{$", "$\\nosuch{x}$", "<script>alert(1)</script>", "{0}", "%s%n", "a'b\"c", "-rf", "--help"]
    letters = ["\x1b]0;x\x07", "a\nb", "a\tb", "été", "日本 語", "\u202egnp", "x" * 200, " ", "CON", "caf\udce9"]
    for name in markup + letters:
        for command in ("train", "check"):
            yield f"class names: {name!r} in {command}", _class_case(name, command)
    for name in ("../x", "/etc/x", "a/b", "", " ", "\x00", "a\nb", "$$", "x" * 300, "..", "con", "-x", "<b>"):
        yield f"task names: {name!r}", override_case(f"tasks=[{json.dumps(name)}]")


def _class_case(name: str, command: str) -> Callable[[Path], list[str]]:
    def prepare(place: Path) -> list[str]:
        folder_task(place, ("ant", name))
        return ["check", "photos.yaml", "--root", "."] if command == "check" else [
            "train", folder_config(place), "--run", "run",
        ]  # fmt: skip

    return prepare


def places() -> Iterator[Case]:
    """Yield cases whose run folder is a special file."""
    for kind in ("FIFO", "device", "broken link", "link to itself", "socket"):
        yield f"run folders: {kind}", _run_case(kind)


def _run_case(kind: str) -> Callable[[Path], list[str]]:
    def prepare(place: Path) -> list[str]:
        _special(place / "there", kind)
        return [*train_command(place)[:-1], "there"]

    return prepare
