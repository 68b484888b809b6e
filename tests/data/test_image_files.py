"""Decoding gives what a viewer shows, or an error with the image's name. It never hangs or starts another program."""

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from moe_bsr.data import UnreadableImage, decode
from moe_bsr.data import image_files as module
from moe_bsr.data.formats import EXTENSIONS, FORMATS, advice
from moe_bsr.data.image_files import rgb_pixels


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, bits: int, color: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG in a form that Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        *chunks,
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


NOISE = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)


def icon() -> Image.Image:
    """Return a black disc on a transparent background whose color values are black too."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((8, 8, 23, 23), fill=(0, 0, 0, 255))
    return image


def animation() -> Image.Image:
    return Image.new("RGBA", (32, 32), (0, 0, 0, 255))


TRANSPARENT = {
    "rgba png": lambda: encoded(icon()),
    "la png": lambda: encoded(icon().convert("LA")),
    "palette png": lambda: encoded(icon().quantize(4)),
    "webp": lambda: encoded(icon(), "WEBP", lossless=True),
    "gif": lambda: encoded(icon(), "GIF"),
    "tiff": lambda: encoded(icon(), "TIFF"),
    "tga": lambda: encoded(icon(), "TGA"),
    "ico": lambda: encoded(icon(), "ICO", sizes=[(32, 32)]),
    "animated gif": lambda: encoded(icon(), "GIF", save_all=True, append_images=[animation()]),
    "animated png": lambda: encoded(icon(), "PNG", save_all=True, append_images=[animation()], default_image=True),
    "animated webp": lambda: encoded(icon(), "WEBP", save_all=True, append_images=[animation()], lossless=True),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_lies_on_white(kind):
    pixels = decode(TRANSPARENT[kind](), "icon")
    assert pixels.shape == (32, 32, 3)
    assert (pixels[0, 0] == 255).all() and (pixels[16, 16] == 0).all()


def bmp_with_alpha(pixels: np.ndarray) -> bytes:
    """Return a BMP with an alpha mask, which Pillow does not write. `pixels` is uint8 (H, W, 4), RGBA."""
    data = np.ascontiguousarray(pixels[::-1, :, [2, 1, 0, 3]]).tobytes()
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    sizes = struct.pack("<IiiHHIIiiII", 108, pixels.shape[1], pixels.shape[0], 1, 32, 3, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 122 + len(data), 0, 0, 122) + sizes + masks + b"BGRs" + bytes(48) + data


@pytest.mark.parametrize("kind", ["BMP", "TGA", "gray TGA"])
def test_alpha_that_was_never_written_hides_nothing(kind):
    pixels = np.dstack([NOISE, np.zeros(NOISE.shape[:2], np.uint8)])
    image = Image.fromarray(pixels).convert("LA" if kind == "gray TGA" else "RGBA")
    for some in (False, True):  # if the alpha of a single pixel is set, the others are transparent
        image.putpixel((0, 0), (9, 255 * some) if kind == "gray TGA" else (9, 9, 9, 255 * some))
        file = bmp_with_alpha(np.array(image)) if kind == "BMP" else encoded(image, "TGA")
        seen = decode(file, "alpha")
        opaque = np.array(image.convert("RGBA"))[..., :3]
        on_white = np.full_like(opaque, 255)
        on_white[0, 0] = 9
        assert np.array_equal(seen, on_white if some else opaque)


def test_modes_that_files_rarely_have():
    palette = Image.new("PA", (32, 32))
    palette.putpixel((16, 16), (0, 255))
    for image in (icon().convert("LA").convert("La"), icon().convert("RGBa"), palette):
        pixels = rgb_pixels(image)
        assert (pixels[0, 0] == 255).all() and (pixels[16, 16] == 0).all()


@pytest.mark.parametrize(
    "bits, color, rows, key",
    [
        (1, 0, [b"\x80"], struct.pack(">H", 0)),
        (2, 0, [b"\xc0"], struct.pack(">H", 0)),
        (4, 0, [b"\xf5"], struct.pack(">H", 5)),
        (8, 0, [b"\xff\x07"], struct.pack(">H", 7)),
        (16, 0, [b"\xff\xff\x12\x34"], struct.pack(">H", 0x1234)),
        (8, 2, [b"\xff\xff\xff\x01\x02\x03"], b"\0\x01\0\x02\0\x03"),
        (16, 2, [b"\xff" * 6 + b"\x12\x34\x56\x78\x9a\xbc"], b"\x12\x34\x56\x78\x9a\xbc"),
    ],
)
def test_a_transparent_color_is_white_at_every_depth(bits, color, rows, key):
    assert (decode(png(2, 1, bits, color, rows, (b"tRNS", key)), "key") == 255).all()
    assert not (decode(png(2, 1, bits, color, rows), "key") == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
def test_opaque_images_are_what_pillow_makes_of_them(mode):
    image = Image.fromarray(NOISE).convert(mode)
    content = encoded(image, "TIFF")
    assert np.array_equal(decode(content, "x"), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    opaque = Image.fromarray(NOISE).convert("RGBA")
    assert np.array_equal(decode(encoded(opaque), "x"), NOISE)


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("before", [True, False])
def test_long_texts_and_profiles_hide_no_image(name, before, tmp_path):
    """Pillow refuses more than a megabyte of text, and image editors store whole edit histories there."""
    content = (b"k\0\1\0\0\0" if name == b"iTXt" else b"k\0\0") + zlib.compress(bytes(2_000_000))
    text = png(1, 1, 8, 2, [], (name, content))[33 : 33 + 12 + len(content)]
    file = encoded(Image.fromarray(NOISE))
    file = file[:33] + text + file[33:] if before else file[:-12] + text + file[-12:]
    (tmp_path / "long.png").write_bytes(file)
    assert np.array_equal(decode(file, "long"), NOISE)
    assert np.array_equal(decode(tmp_path / "long.png", "long"), NOISE)
    with pytest.raises(UnreadableImage, match="long: not a readable image"):
        decode(file[:60] + file[-12:], "long")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "AVIF"])
def test_a_damaged_header_is_called_that(kind):
    if kind not in FORMATS:
        pytest.skip(f"no {kind} here")
    with pytest.raises(UnreadableImage, match="damaged, or it is cut off"):
        file = encoded(Image.fromarray(NOISE), kind)
        decode(file[:29] + b"?" + file[30:] if kind == "PNG" else file[:12], "cut")  # a PNG: the header's checksum


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (3, 3), (0, 0, 0, 128))
    assert abs(int(decode(encoded(image), "x").mean()) - 127) <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_images_are_turned_upright(kind, orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(NOISE), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert np.array_equal(decode(content, "x"), expected)
    monkeypatch.setattr(module, "BAND", 2 * NOISE.shape[1])  # as a large image, a few rows at a time
    assert np.array_equal(decode(content, "x"), expected)


def wide(top: int) -> np.ndarray:
    return np.linspace(0, top, 256).astype(np.uint16).reshape(16, 16)


def gray_16(form: str, values: np.ndarray) -> bytes:
    if form == "PGM":
        return b"P5\n16 16\n65535\n" + values.astype(">u2").tobytes()
    if form == "big TIFF":
        return encoded(Image.fromarray(values.astype(">u2")), "TIFF")
    return encoded(Image.fromarray(values), form)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "big TIFF", "PGM"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_fewer_bits_in_16_bit_files_are_named_or_read_as_told(form, bits):
    content = gray_16(form, wide(2**bits - 1))
    with pytest.raises(UnreadableImage, match=rf"x: .*largest value is {2**bits - 1} of 65535.*bits: {bits}.*bits: 16"):
        decode(content, "x")
    pixels = decode(content, "x", bits)
    assert (pixels.min(), pixels.max()) == (0, 255) and len(np.unique(pixels)) > 200
    assert decode(content, "x", 16).max() == (2**bits - 1) // 257
    if bits > 8:
        with pytest.raises(UnreadableImage, match="the task file says bits: 8"):
            decode(content, "x", 8)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "big TIFF", "PGM"])
def test_sixteen_bits_are_scaled(form):
    for bits in (None, 16):
        assert np.array_equal(decode(gray_16(form, wide(65535)), "x", bits)[..., 0], wide(65535) // 257)
    assert not decode(gray_16(form, np.zeros((16, 16), np.uint16)), "x").any()  # black at any depth


@pytest.mark.parametrize("color, channels", [(2, 3), (6, 4), (4, 2)])
def test_fewer_bits_in_16_bit_color_are_refused_for_pillow_drops_them(color, channels):
    values = np.full((4, 4 * channels), 4095, ">u2")
    values[:, channels - 1 :: channels] = 65535 if channels != 3 else 4095
    content = png(4, 4, 16, color, [row.tobytes() for row in values])
    for bits in (None, 12):
        with pytest.raises(UnreadableImage, match="16-bit color.*convert it to 8 bits"):
            decode(content, "x", bits)
    assert decode(content, "x", 16).max() == 15
    bright = png(4, 4, 16, color, [np.full(4 * channels, 65535, ">u2").tobytes()] * 4)
    assert (decode(bright, "x") == 255).all()


def test_a_file_that_states_its_depth_or_that_white_is_zero_is_believed():
    for top, stated in ((4095, 4095), (1023, 1023)):
        values = wide(top).astype(">u2").tobytes()
        assert decode(b"P5\n16 16\n%d\n" % stated + values, "x").max() == 255
    inverted = encoded(Image.fromarray(wide(65535)), "TIFF", tiffinfo={262: 0})
    if Image.open(io.BytesIO(inverted)).tag_v2[262] == 0:
        assert np.array_equal(decode(inverted, "x")[..., 0], 255 - wide(65535) // 257)


@pytest.mark.parametrize("values", [np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)])
def test_pixels_of_unknown_white_are_refused(values):
    with pytest.raises(UnreadableImage, match=r"x\.tif: .*floating-point.*8 or 16 bits"):
        decode(encoded(Image.fromarray(values), "TIFF"), "x.tif")


ENDINGS = ".jpg .jpeg .jfif .jpe .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .tga .ico .jp2 .pcx"


def test_endings_are_those_of_what_can_be_read():
    assert set(ENDINGS.split()) <= EXTENSIONS
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".svg", ".h5", ".mpg", ".txt"} & EXTENSIONS
    for ending in (".heic", ".cr2", ".nef", ".arw", ".dng", ".svg", ".psd", ".jxl", ".pdf"):
        assert (advice(ending) is None) == (ending in EXTENSIONS)
    assert advice(".txt") is None and advice(".jpg") is None


@pytest.mark.parametrize("ending", sorted({*ENDINGS.split(), ".avif", ".qoi"} & EXTENSIONS))
def test_every_ending_can_be_read(ending, tmp_path):
    file = tmp_path / f"image{ending}"
    mode = {".pgm": "L", ".pbm": "1"}.get(ending, "RGB")
    image = Image.fromarray(np.full((16, 16, 3), 255, np.uint8)).convert(mode)
    image.save(file) if ending not in (".jpe", ".jfif") else image.save(file, "JPEG")
    assert (decode(file, str(file)) >= 250).all()


def test_no_other_program_is_started(tmp_path, monkeypatch):
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
def test_what_is_no_image_is_named_with_what_it_is(content, what):
    if b"heic" in content and ".heic" in EXTENSIONS:
        pytest.skip("HEIC is read here")
    with pytest.raises(UnreadableImage) as refusal:
        decode(content, "photos/a.jpg")
    assert str(refusal.value).startswith("photos/a.jpg: not a readable image (")
    assert what in str(refusal.value).lower() or what in str(refusal.value)
    assert "remove" not in str(refusal.value) and "0x" not in str(refusal.value)


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path):
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


def test_names_cannot_command_a_terminal():
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


def test_pillows_own_limit_is_told_alike(monkeypatch):
    content = encoded(Image.new("RGB", (60, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="x: .*megapixels, and at most 100 are read"):
        decode(content, "x")


def test_a_huge_jpeg_is_read_at_half_its_size(monkeypatch, tmp_path):
    smooth = Image.fromarray(NOISE).resize((640, 480))
    content = encoded(smooth, "JPEG", quality=95)
    monkeypatch.setattr(module, "MAX_PIXELS", 200_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # Pillow raises at twice its limit: go round it
    half = np.asarray(smooth.resize((320, 240), Image.Resampling.BOX), dtype=float)
    (tmp_path / "x.jpg").write_bytes(content)
    for source in (content, tmp_path / "x.jpg"):
        assert np.abs(decode(source, "x") - half).mean() < 3
    with pytest.raises(UnreadableImage, match="megapixels"):
        decode(encoded(smooth, "JPEG", progressive=True), "x")
    monkeypatch.setattr(module, "MAX_PIXELS", 50_000)
    with pytest.raises(UnreadableImage, match="megapixels"):
        decode(content, "x")


def test_an_endless_side_is_refused(monkeypatch):
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


def test_heic_is_read_where_the_package_for_it_is():
    pillow_heif = pytest.importorskip("pillow_heif")
    smooth = Image.fromarray(NOISE).resize((64, 48))
    stream = io.BytesIO()
    pillow_heif.from_pillow(smooth).save(stream, quality=95)
    assert ".heic" in EXTENSIONS and np.abs(decode(stream.getvalue(), "x") - np.asarray(smooth, float)).mean() < 6


def test_a_jpegs_end_may_be_missing_and_rubbish_may_follow(tmp_path: Path):
    content = encoded(Image.fromarray(NOISE).resize((90, 70)), "JPEG")
    whole = decode(content, "x")
    for other in (content[:-2], content + b"\0" * 5000):
        assert np.array_equal(decode(other, "x"), whole)
