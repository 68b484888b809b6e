"""Cases for `hostile`: weights, packs and names of backbones made by an attacker."""

import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe_bsr.selftest.hostile_parts import (
    Case,
    Content,
    Payload,
    encoded,
    folder_config,
    made,
    override_case,
    train_command,
)


def _safetensors(header: bytes | dict[str, Any], length: int | None = None, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def weights(rng: random.Random) -> Iterator[Case]:
    payload = pickle.dumps(Payload())
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    files = {
        "pickle": payload,
        "pickle of a dict": pickle.dumps({"cls_token": Payload()}),
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
        "random": rng.randbytes(5000),
    }  # fmt: skip
    for name, content in files.items():
        for ending in ("safetensors", "pth", "npz", "bin"):
            if rng.random() < 0.6 or name in ("pickle", "zip with a pickle", "object array"):
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
        yield f"backbone: {name[:20]!r}", override_case(f"backbone.name={name}")


def _npz_of_objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, cls=np.array([Payload()], dtype=object))
    return buffer.getvalue()


def _weights_case(content: bytes, ending: str) -> Callable[[Path], list[str]]:
    def prepare(place: Path) -> list[str]:
        (place / f"w.{ending}").write_bytes(content)
        return train_command(place, f"backbone.weights=w.{ending}", "--dry-run")

    return prepare


def _special_weights(ending: str, make: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    def prepare(place: Path) -> list[str]:
        make(place / f"w.{ending}")
        return train_command(place, f"backbone.weights=w.{ending}", "--dry-run")

    return prepare


def packs(rng: random.Random) -> Iterator[Case]:
    png = encoded(Image.new("RGB", (8, 8), "blue"), "PNG")
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
        "objects": {"labels": np.array([Payload()] * 4, dtype=object)},
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
    yield "packs: no zip", _pack_case(rng.randbytes(500))
    yield "packs: pickle", _pack_case(pickle.dumps(Payload()))
    members = {f"{key}.npy": _npy(value) for key, value in good.items()}
    yield "packs: bomb", _pack_case(lambda: _compressed(members, 2**30))
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
    """Return a zip file with the members, except that labels.npy is replaced by `zeros` bytes, which compress well."""
    buffer = io.BytesIO()
    header = _npy(np.zeros(0, np.int64)).replace(b"(0,)", f"({zeros // 8},)".encode())[:128]
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            if name == "labels.npy":
                with archive.open(name, "w") as member:
                    member.write(header)
                    for _ in range(zeros // 2**20):
                        member.write(bytes(2**20))
            else:
                archive.writestr(name, content)
    return buffer.getvalue()


def _pack_case(content: Content, classes: bytes = b"a\nb\n") -> Callable[[Path], list[str]]:
    def prepare(place: Path) -> list[str]:
        (place / "photos").mkdir()
        for split in ("train", "test"):
            (place / f"photos/{split}.npz").write_bytes(made(content))
        (place / "photos/classes.txt").write_bytes(classes)
        (place / "photos.yaml").write_text("title: Photos\nsource: packed\npath: photos\n")
        return ["train", folder_config(place), "--run", "run"]

    return prepare
