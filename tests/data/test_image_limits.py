"""Test which files and sizes are decoded: file formats, special files, limits, and errors that name the image."""

import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_images import NOISE, encoded

from moe_bsr.data import UnreadableImage, decode
from moe_bsr.data import image_files as module
from moe_bsr.data.formats import EXTENSIONS, FORMATS, advice

ENDINGS = ".jpg .jpeg .jfif .jpe .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .tga .ico .jp2 .pcx"


def test_file_extensions_match_the_readable_formats():
    assert set(ENDINGS.split()) <= EXTENSIONS
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".svg", ".h5", ".mpg", ".txt"} & EXTENSIONS
    for ending in (".heic", ".cr2", ".nef", ".arw", ".dng", ".svg", ".psd", ".jxl", ".pdf"):
        assert (advice(ending) is None) == (ending in EXTENSIONS)
    assert advice(".txt") is None and advice(".jpg") is None


@pytest.mark.parametrize("ending", sorted({*ENDINGS.split(), ".avif", ".qoi"} & EXTENSIONS))
def test_every_file_extension_can_be_read(ending, tmp_path):
    file = tmp_path / f"image{ending}"
    mode = {".pgm": "L", ".pbm": "1"}.get(ending, "RGB")
    image = Image.fromarray(np.full((16, 16, 3), 255, np.uint8)).convert(mode)
    image.save(file) if ending not in (".jpe", ".jfif") else image.save(file, "JPEG")
    assert (decode(file, str(file)) >= 250).all()


def test_decoding_starts_no_other_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    for name in ("EPS", "WMF", "PDF"):
        assert name not in FORMATS
    for start in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
        b"%PDF-1.4\n",
    ):
        with pytest.raises(UnreadableImage, match=r"x\.png: not a readable image"):
            decode(start, "x.png")


@pytest.mark.parametrize(
    "content, what",
    [
        (b"", "it is empty"),
        (b"\0" * 64, "begins with zeros"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"<html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image: pip install pillow-heif"),
        (b"<svg xmlns=", "an SVG drawing"),
        (b"nothing known", "its image format is unknown or not supported"),
        (encoded(Image.fromarray(NOISE))[:60], "truncated"),
        (encoded(Image.fromarray(NOISE), "JPEG")[:400], "truncated"),
    ],
)
def test_a_file_that_is_not_an_image_is_refused_with_its_kind(content, what):
    if b"heic" in content and ".heic" in EXTENSIONS:
        pytest.skip("HEIC is read here")
    with pytest.raises(UnreadableImage) as refusal:
        decode(content, "photos/a.jpg")
    assert str(refusal.value).startswith("photos/a.jpg: not a readable image (")
    assert what in str(refusal.value).lower() or what in str(refusal.value)
    assert "remove" not in str(refusal.value) and "0x" not in str(refusal.value)


def test_special_files_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.png"))
        for name, what in {
            "fifo": "a FIFO", "folder": "a folder", "lost": "a link that leads nowhere", "zero": "a device",
            "s": "a socket", "none": "no such file",
        }.items():  # fmt: skip
            with pytest.raises(UnreadableImage, match=f"{name}.png: .*{what}"):
                decode(tmp_path / f"{name}.png", f"{name}.png")


def test_a_forbidden_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_opened", lambda *a: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UnreadableImage, match=r"a\.png: not a readable image \(Permission denied\)"):
        decode(tmp_path / "a.png", "a.png")


def test_control_characters_in_file_names_are_escaped():
    with pytest.raises(UnreadableImage) as refusal:
        decode(b"", "a\x1b]0;x\x07\n.png")
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("kind, mode", [("PNG", "RGB"), ("PNG", "1"), ("BMP", "L"), ("GIF", "L"), ("TIFF", "RGB")])
def test_too_many_pixels_are_refused_before_decoding(kind, mode, monkeypatch):
    content = encoded(Image.new(mode, (60, 50)), kind)
    monkeypatch.setattr(module, "MAX_PIXELS", 3000)
    assert decode(content, "x").shape == (50, 60, 3)
    monkeypatch.setattr(module, "MAX_PIXELS", 2999)
    with pytest.raises(UnreadableImage, match="x: .*megapixels.*make it smaller"):
        decode(content, "x")


def test_the_limit_of_pillow_gives_the_same_error(monkeypatch):
    content = encoded(Image.new("RGB", (60, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="x: .*megapixels, and at most 100 are read"):
        decode(content, "x")


def test_a_huge_jpeg_is_read_at_half_its_size(monkeypatch, tmp_path):
    smooth = Image.fromarray(NOISE).resize((640, 480))
    content = encoded(smooth, "JPEG", quality=95)
    monkeypatch.setattr(module, "MAX_PIXELS", 200_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # Pillow raises an error above twice its own limit
    half = np.asarray(smooth.resize((320, 240), Image.Resampling.BOX), dtype=float)
    (tmp_path / "x.jpg").write_bytes(content)
    for source in (content, tmp_path / "x.jpg"):
        assert np.abs(decode(source, "x") - half).mean() < 3
    with pytest.raises(UnreadableImage, match="megapixels"):
        decode(encoded(smooth, "JPEG", progressive=True), "x")
    monkeypatch.setattr(module, "MAX_PIXELS", 50_000)
    with pytest.raises(UnreadableImage, match="megapixels"):
        decode(content, "x")


def test_a_too_long_side_is_refused(monkeypatch):
    monkeypatch.setattr(module, "MAX_SIDE", 100)
    with pytest.raises(UnreadableImage, match="101 x 1 pixels, and a side may have 100"):
        decode(encoded(Image.new("L", (101, 1))), "x")


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 10)
    inside = []

    class Lock:
        def __enter__(self):
            inside.append(1)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(module, "_large_images", Lock())
    decode(encoded(Image.new("RGB", (3, 3))), "x")
    assert not inside
    decode(encoded(Image.new("RGB", (4, 4))), "x")
    assert inside


def test_heic_is_read_if_pillow_heif_is_installed():
    pillow_heif = pytest.importorskip("pillow_heif")
    smooth = Image.fromarray(NOISE).resize((64, 48))
    stream = io.BytesIO()
    pillow_heif.from_pillow(smooth).save(stream, quality=95)
    assert ".heic" in EXTENSIONS and np.abs(decode(stream.getvalue(), "x") - np.asarray(smooth, float)).mean() < 6


def test_a_jpeg_may_lack_its_end_or_have_trailing_bytes(tmp_path: Path):
    content = encoded(Image.fromarray(NOISE).resize((90, 70)), "JPEG")
    whole = decode(content, "x")
    for other in (content[:-2], content + b"\0" * 5000):
        assert np.array_equal(decode(other, "x"), whole)
