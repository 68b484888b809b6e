"""Test that decoding gives the pixels that an image viewer shows, or an error that names the file."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from tiny_images import NOISE, encoded

from moe_bsr.data import UnreadableImage, decode
from moe_bsr.data import image_files as module
from moe_bsr.data.formats import FORMATS
from moe_bsr.data.image_files import rgb_pixels


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
def test_transparent_pixels_become_white(kind):
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
def test_an_alpha_channel_of_zeros_is_ignored(kind):
    pixels = np.dstack([NOISE, np.zeros(NOISE.shape[:2], np.uint8)])
    image = Image.fromarray(pixels).convert("LA" if kind == "gray TGA" else "RGBA")
    for some in (False, True):  # if the alpha of a single pixel is set, the others are transparent
        image.putpixel((0, 0), (9, 255 * some) if kind == "gray TGA" else (9, 9, 9, 255 * some))
        file = bmp_with_alpha(np.array(image)) if kind == "BMP" else encoded(image, "TGA")
        found = decode(file, "alpha")
        opaque = np.array(image.convert("RGBA"))[..., :3]
        on_white = np.full_like(opaque, 255)
        on_white[0, 0] = 9
        assert np.array_equal(found, on_white if some else opaque)


def test_rare_image_modes():
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
def test_a_transparent_color_key_becomes_white_at_every_bit_depth(bits, color, rows, key):
    assert (decode(png(2, 1, bits, color, rows, (b"tRNS", key)), "key") == 255).all()
    assert not (decode(png(2, 1, bits, color, rows), "key") == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
def test_opaque_images_equal_pillows_rgb_conversion(mode):
    image = Image.fromarray(NOISE).convert(mode)
    content = encoded(image, "TIFF")
    assert np.array_equal(decode(content, "x"), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    opaque = Image.fromarray(NOISE).convert("RGBA")
    assert np.array_equal(decode(encoded(opaque), "x"), NOISE)


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("before", [True, False])
def test_images_with_long_texts_and_profiles_are_read(name, before, tmp_path):
    """Pillow refuses more than a megabyte of text, but image editors store whole edit histories in such chunks."""
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
def test_a_damaged_header_is_named(kind):
    if kind not in FORMATS:
        pytest.skip(f"no {kind} here")
    with pytest.raises(UnreadableImage, match="damaged, or it is cut off"):
        file = encoded(Image.fromarray(NOISE), kind)
        decode(file[:29] + b"?" + file[30:] if kind == "PNG" else file[:12], "cut")  # PNG: a wrong checksum


def test_half_transparent_black_becomes_gray():
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
    monkeypatch.setattr(module, "BAND", 2 * NOISE.shape[1])  # process it like a large image, a few rows at a time
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
def test_fewer_bits_in_16_bit_files_are_refused_unless_specified(form, bits):
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
def test_16_bit_images_are_scaled_to_8_bits(form):
    for bits in (None, 16):
        assert np.array_equal(decode(gray_16(form, wide(65535)), "x", bits)[..., 0], wide(65535) // 257)
    assert not decode(gray_16(form, np.zeros((16, 16), np.uint16)), "x").any()  # black at any depth


@pytest.mark.parametrize("color, channels", [(2, 3), (6, 4), (4, 2)])
def test_fewer_bits_in_16_bit_color_files_are_refused(color, channels):
    values = np.full((4, 4 * channels), 4095, ">u2")
    values[:, channels - 1 :: channels] = 65535 if channels != 3 else 4095
    content = png(4, 4, 16, color, [row.tobytes() for row in values])
    for bits in (None, 12):
        with pytest.raises(UnreadableImage, match="16-bit color.*convert it to 8 bits"):
            decode(content, "x", bits)
    assert decode(content, "x", 16).max() == 15
    bright = png(4, 4, 16, color, [np.full(4 * channels, 65535, ">u2").tobytes()] * 4)
    assert (decode(bright, "x") == 255).all()


def test_a_stated_maximum_or_inverted_gray_scale_is_applied():
    for top, stated in ((4095, 4095), (1023, 1023)):
        values = wide(top).astype(">u2").tobytes()
        assert decode(b"P5\n16 16\n%d\n" % stated + values, "x").max() == 255
    inverted = encoded(Image.fromarray(wide(65535)), "TIFF", tiffinfo={262: 0})
    if Image.open(io.BytesIO(inverted)).tag_v2[262] == 0:
        assert np.array_equal(decode(inverted, "x")[..., 0], 255 - wide(65535) // 257)


@pytest.mark.parametrize("values", [np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)])
def test_pixel_types_without_a_defined_white_are_refused(values):
    with pytest.raises(UnreadableImage, match=r"x\.tif: .*floating-point.*8 or 16 bits"):
        decode(encoded(Image.fromarray(values), "TIFF"), "x.tif")
