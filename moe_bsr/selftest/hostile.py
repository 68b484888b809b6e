"""Files that somebody hostile, or a bad day, puts where images, weights, packs and names are read.

Each is refused in clear words, or read for what it is: nothing in it is executed, nothing outside is written, the
terminal gets no control letters, memory and time stay bounded.
"""

import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe_bsr.selftest import sandbox, tiny
from moe_bsr.selftest.sandbox import Main

CANARY = b"nobody may write here\n"
MEMORY_MB = 1500  # beyond what the libraries take
Case = tuple[str, Callable[[Path], list[str]]]  # a name; writes files into a folder, returns a command line


def campaign(
    folder: Path, count: int, seed: int, main: Main, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Try the cases, in turn from `seed` on; returns plain values: tried, failed, and each failure in words."""
    cases = list(all_cases(random.Random(seed)))
    random.Random(seed).shuffle(cases)
    kinds: dict[str, int] = {}
    failures = []
    for name, prepare in cases[:count]:
        place = folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        canary = folder / "canary"
        canary.write_bytes(CANARY)
        arguments = prepare(place)
        kinds[name.split(":")[0]] = kinds.get(name.split(":")[0], 0) + 1
        if wrong := _try(place, canary, lambda arguments=arguments: main(arguments)):
            failures.append({"case": name, "wrong": wrong})
            progress(f"{name}: {wrong}")
    return {"tried": sum(kinds.values()), "seed": seed, "failed": len(failures), "kinds": kinds, "failures": failures}


def _try(place: Path, canary: Path, command: Callable[[], int]) -> str | None:
    before = sorted(path.name for path in canary.parent.iterdir())
    outcome = sandbox.run(command, folder=place, memory_mb=MEMORY_MB + 4000)
    if wrong := outcome.trouble:
        return wrong
    if canary.read_bytes() != CANARY or sorted(path.name for path in canary.parent.iterdir()) != before:
        return "wrote outside of its folder"
    if (place / "executed").exists():
        return "executed what was in the file"
    if outcome.peak_mb > MEMORY_MB:
        return f"took {outcome.peak_mb:.0f} MB"
    printed = outcome.stdout + outcome.stderr
    if bad := {c for c in printed if (ord(c) < 32 and c not in "\n\t\r") or ord(c) in (0x7F, 0x202E, 0x2066, 0x9B)}:
        return f"printed control letters {sorted(map(hex, map(ord, bad)))}"
    wrong = outcome.unclear() if outcome.refused else None
    return None if wrong == sandbox.SILENT and outcome.stdout.strip() else wrong  # check lists what it found


def all_cases(chance: random.Random) -> Iterator[Case]:
    """Every case there is."""
    yield from _weights(chance)
    yield from _images(chance)
    yield from _packs(chance)
    yield from _names()
    yield from _places()


# --- weights ---


class _Payload:
    """Unpickling this writes a file."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch executed",))


def _safetensors(header: bytes | dict[str, Any], length: int | None = None, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _weights(chance: random.Random) -> Iterator[Case]:
    payload = pickle.dumps(_Payload())
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    files = {
        "pickle": payload,
        "pickle of a dict": pickle.dumps({"cls_token": _Payload()}),
        "zip with a pickle": _zip({"archive/data.pkl": payload, "archive/version": b"3\n"}),
        "object array": _npz_of_objects(),
        "header of 2**60": _safetensors(b"{}", 2**60),
        "negative header": b"\xff" * 8 + b"{}",
        "brackets": _safetensors(b"[" * 100_000),
        "nested keys": _safetensors(b'{"a":' * 50_000),
        "overlapping": _safetensors({"a": entry, "b": entry}, data=bytes(16)),
        "beyond the end": _safetensors({"a": entry | {"data_offsets": [0, 10**12]}}, data=bytes(16)),
        "shape overflows": _safetensors({"a": entry | {"shape": [2**62, 2**62]}}, data=bytes(16)),
        "unknown dtype": _safetensors({"a": entry | {"dtype": "F128"}}, data=bytes(16)),
        "a hole": _safetensors({"a": entry | {"data_offsets": [8, 24]}}, data=bytes(24)),
        "control letters": _safetensors({"\x1b]0;x\x07": entry}, data=bytes(16)),
        "bidirectional": _safetensors({"a\u202eb": entry}, data=bytes(16)),
        "long name": _safetensors({"a" * 100_000: entry}, data=bytes(16)),
        "metadata": _safetensors({"__metadata__": {"architecture": '{"depth": 10000000}'}, "a": entry}, data=bytes(16)),
        "empty": b"",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n",
        "page": b"<!DOCTYPE html><html><body>404</body></html>",
        "text": b"hello\n",
        "gzip bomb": zlib.compress(bytes(10**7)) * 3,
        "random": chance.randbytes(5000),
    }  # fmt: skip
    for name, content in files.items():
        for ending in ("safetensors", "pth", "npz", "bin"):
            if chance.random() < 0.6 or name in ("pickle", "zip with a pickle", "object array"):
                yield f"weights: {name}.{ending}", _weights_case(content, ending)
    for ending in ("safetensors", "pth"):
        yield f"weights: FIFO.{ending}", _special_weights(ending, os.mkfifo)
        yield f"weights: folder.{ending}", _special_weights(ending, os.mkdir)
        yield f"weights: device.{ending}", _special_weights(ending, lambda path: os.symlink("/dev/zero", path))
    for name in (
        "../../etc/passwd",
        "../x",
        "local-dir:",
        "hf_hub:",
        "local-dir:/dev",
        "a/b/c",
        "\x1b[31m",
        "x" * 5000,
    ):
        yield f"backbone: {name[:20]!r}", _override_case(f"backbone.name={name}")


def _npz_of_objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, cls=np.array([_Payload()], dtype=object))
    return buffer.getvalue()


def _weights_case(content: bytes, ending: str) -> Callable[[Path], list[str]]:
    def prepare(place: Path) -> list[str]:
        (place / f"w.{ending}").write_bytes(content)
        return _train(place, f"backbone.weights=w.{ending}", "--dry-run")

    return prepare


def _special_weights(ending: str, make: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    def prepare(place: Path) -> list[str]:
        make(place / f"w.{ending}")
        return _train(place, f"backbone.weights=w.{ending}", "--dry-run")

    return prepare


def _override_case(override: str) -> Callable[[Path], list[str]]:
    return lambda place: _train(place, override, "--dry-run")


def _train(place: Path, *more: str) -> list[str]:
    _, file = tiny.write_config(
        place, train__pictures=False, train__steps=2, train__checkpoint_every=2, train__eval_every=2
    )
    return ["train", file.name, "--run", "run", *more]


# --- images ---


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def _images(chance: random.Random) -> Iterator[Case]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    jpeg, png = _encoded(noise, "JPEG"), _encoded(noise, "PNG")
    files = {
        "empty.png": b"",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "flipped.png": png[:100] + bytes([png[100] ^ 255]) + png[101:],
        "random.jpg": chance.randbytes(3000),
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file\nshowpage\n",
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "page.jpg": b"<!DOCTYPE html><html></html>",
        "huge header.png": _png_header(100_000, 100_000),
        "bomb.png": _encoded(Image.new("L", (13_000, 13_000)), "PNG"),
        "wide.png": _encoded(Image.new("RGB", (60_000, 1), "red"), "PNG"),
        "tall.png": _encoded(Image.new("RGB", (1, 60_000), "red"), "PNG"),
        "frames.gif": _encoded(
            noise, "GIF", save_all=True, append_images=[noise.rotate(3 * n) for n in range(100)]
        ),
        "one pixel.png": _encoded(Image.new("RGB", (1, 1)), "PNG"),
        "text.png": _png_with_text(png, b"x" * 2_000_000),
        "float.tif": _encoded(Image.new("F", (30, 30), 0.5), "TIFF"),
        "clear.png": _encoded(Image.new("RGBA", (30, 30), (0, 0, 0, 0)), "PNG"),
        "pickle.png": pickle.dumps(_Payload()),
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


def _image_case(name: str, content: bytes | str, command: str) -> Callable[[Path], list[str]]:
    def prepare(place: Path) -> list[str]:
        _folder_task(place)
        image = place / "photos/train/ant" / name
        if isinstance(content, bytes):
            image.write_bytes(content)
        else:
            _special(image, content)
        if command == "predict":
            return ["predict", "no-run", str(image.relative_to(place))]
        if command in ("check", "pack"):
            return [command, "photos.yaml", "--root", "."]
        return ["train", _folder_config(place), "--run", "run"]

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


def _folder_task(place: Path, classes: tuple[str, ...] = ("ant", "bee"), each: int = 8) -> None:
    for split, count in (("train", each), ("test", 2)):
        for label, name in enumerate(classes):
            folder = place / "photos" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for n in range(count):
                pixels = np.random.default_rng(100 * label + n).integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    (place / "photos.yaml").write_text("title: Photos\nsource: folder\npath: photos\n")


def _folder_config(place: Path) -> str:
    _, file = tiny.write_config(
        place,
        tasks=["photos.yaml"],
        data__root=".",
        train__pictures=False,
        train__steps=2,
        train__checkpoint_every=2,
        train__eval_every=2,
        train__grad_accumulation_steps=1,
    )
    return file.name


# --- packs ---


def _packs(chance: random.Random) -> Iterator[Case]:
    png = _encoded(Image.new("RGB", (8, 8), "blue"), "PNG")
    images = np.frombuffer(png * 4, np.uint8)
    offsets, labels = np.arange(5) * len(png), np.array([0, 1, 0, 1])
    good = {"jpeg": images, "offsets": offsets, "labels": labels}
    changes: dict[str, dict[str, Any]] = {
        "offsets wrap": {"offsets": np.array([0, 2**63 - 1, -(2**63), 5, 9])},
        "offsets fall": {"offsets": offsets[::-1].copy()},
        "offsets outside": {"offsets": offsets + 10**9},
        "no images": {"jpeg": images[:0], "offsets": np.array([0]), "labels": labels[:0]},
        "labels outside": {"labels": np.array([0, 1, 2, 10**9])},
        "negative labels": {"labels": np.array([0, -1, 0, 1])},
        "floats": {"labels": np.array([0.0, 1, 0, 1])},
        "two dimensions": {"jpeg": images[None]},
        "objects": {"labels": np.array([_Payload()] * 4, dtype=object)},
        "one label fewer": {"labels": labels[:3]},
    }
    for name, change in changes.items():
        buffer = io.BytesIO()
        np.savez(buffer, **{**good, **change})
        yield f"packs: {name}", _pack_case(buffer.getvalue())
    header = b"\x93NUMPY\x01\x00"
    shapes = {
        "8 TiB": b"{'descr': '|u1', 'fortran_order': False, 'shape': (8796093022208,), }",
        "brackets": b"(" * 3000,
        "code": b"{'descr': __import__('os').system('touch executed'), 'fortran_order': False, 'shape': (1,), }",
        "negative": b"{'descr': '|u1', 'fortran_order': False, 'shape': (-5,), }",
    }
    for name, text in shapes.items():
        member = header + struct.pack("<H", len(text)) + text
        for which in ("jpeg", "labels"):
            content = {f"{key}.npy": _npy(value) for key, value in good.items()} | {f"{which}.npy": member}
            yield f"packs: header {name} in {which}", _pack_case(_zip(content))
    yield "packs: no zip", _pack_case(chance.randbytes(500))
    yield "packs: pickle", _pack_case(pickle.dumps(_Payload()))
    yield "packs: bomb", _pack_case(_compressed({f"{key}.npy": _npy(value) for key, value in good.items()}, 2**30))
    buffer = io.BytesIO()
    np.savez(buffer, **good)
    for name, classes in (("Latin-1", b"caf\xe9\nb\n"), ("one", b"a\n"), ("control", b"a\x1b[2J\nb\n"), ("none", b"")):
        yield f"packs: classes {name}", _pack_case(buffer.getvalue(), classes)
    cut = buffer.getvalue()
    for share in (0.2, 0.5, 0.9):
        yield f"packs: cut at {share}", _pack_case(cut[: int(share * len(cut))])


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _compressed(members: dict[str, bytes], zeros: int) -> bytes:
    """A zip in which one member grows to `zeros` bytes."""
    buffer = io.BytesIO()
    header = _npy(np.zeros(0, np.int64)).replace(b"(0,)", f"({zeros // 8},)".encode())[:128]
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if name == "labels.npy":
                with archive.open(name, "w") as member:
                    member.write(header)
                    for _ in range(zeros // 2**20):
                        member.write(bytes(2**20))
            else:
                archive.writestr(name, content)
    return buffer.getvalue()


def _pack_case(content: bytes, classes: bytes = b"a\nb\n") -> Callable[[Path], list[str]]:
    def prepare(place: Path) -> list[str]:
        (place / "photos").mkdir()
        for split in ("train", "test"):
            (place / f"photos/{split}.npz").write_bytes(content)
        (place / "photos/classes.txt").write_bytes(classes)
        (place / "photos.yaml").write_text("title: Photos\nsource: packed\npath: photos\n")
        return ["train", _folder_config(place), "--run", "run"]

    return prepare


# --- names ---


def _names() -> Iterator[Case]:
    markup = ["$$", "$\\frac{$", "$\\nosuch{x}$", "<script>alert(1)</script>", "{0}", "%s%n", "a'b\"c", "-rf", "--help"]
    letters = ["\x1b]0;x\x07", "a\nb", "a\tb", "été", "日本 語", "\u202egnp", "x" * 200, " ", "CON", "caf\udce9"]
    for name in markup + letters:
        for command in ("train", "check"):
            yield f"class names: {name!r} in {command}", _class_case(name, command)
    for name in ("../x", "/etc/x", "a/b", "", " ", "\x00", "a\nb", "$$", "x" * 300, "..", "con", "-x", "<b>"):
        yield f"task names: {name!r}", _override_case(f"tasks=[{json.dumps(name)}]")


def _class_case(name: str, command: str) -> Callable[[Path], list[str]]:
    def prepare(place: Path) -> list[str]:
        _folder_task(place, ("ant", name))
        return ["check", "photos.yaml", "--root", "."] if command == "check" else [
            "train", _folder_config(place), "--run", "run",
        ]  # fmt: skip

    return prepare


def _places() -> Iterator[Case]:
    """Run folders that are none."""
    for kind in ("FIFO", "device", "broken link", "link to itself", "socket"):
        yield f"run folders: {kind}", _run_case(kind)


def _run_case(kind: str) -> Callable[[Path], list[str]]:
    def prepare(place: Path) -> list[str]:
        _special(place / "there", kind)
        return [*_train(place)[:-1], "there"]

    return prepare
