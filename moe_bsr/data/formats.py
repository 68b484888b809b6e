"""Which files are images that can be read here, and what to do about the others.

Pillow chooses a decoder by a file's first bytes, whatever its name says. It may choose among `FORMATS` alone: raster
formats that are decoded in this process, and never one that starts another program (EPS) or has no pixels (WMF).
HEIC photos are read where the package pillow-heif is installed.
"""

import importlib.util

from PIL import Image

# The last one has no signature at its start, so it is asked last.
_WANTED = (
    "JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO", "PCX", "QOI", "SGI",
    "TGA",
)  # fmt: skip

_CONVERT = "convert them to JPEG or PNG"
_HEIF = f"pip install pillow-heif, or {_CONVERT}"
_RAW = "camera raw: export them as JPEG or TIFF"

# Endings of pictures that cannot be read here -> what to do.
_ADVICE = (
    dict.fromkeys((".heic", ".heif", ".hif", ".heics", ".heifs"), _HEIF)
    | dict.fromkeys(
        (".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".pef",
         ".srw", ".x3f", ".3fr", ".erf", ".kdc", ".mrw"),
        _RAW,
    )
    | dict.fromkeys((".svg", ".svgz", ".eps", ".ps", ".pdf", ".wmf", ".emf", ".ai"), "drawings: export them as PNG")
    | dict.fromkeys(
        (".psd", ".psb", ".xcf", ".jxl", ".jxr", ".hdp", ".wdp", ".exr", ".hdr", ".dds", ".fits", ".fit", ".dcm",
         ".dicom", ".nii", ".npy", ".mat", ".icns", ".cur", ".xbm", ".xpm", ".ras", ".pict", ".pct", ".flif", ".bpg",
         ".insp", ".kra", ".clip", ".djvu", ".ktx", ".blp"),
        _CONVERT,
    )
)  # fmt: skip

# How files begin that are no images although their names say so.
_STARTS = (
    (b"version https://git-lfs", "it is a Git LFS pointer and not the image: git lfs pull fetches that"),
    (b"<svg", "it is an SVG drawing: export it as PNG"),
    (b"<!DOCTYPE", "it is a web page"),
    (b"<!doctype", "it is a web page"),
    (b"<html", "it is a web page"),
    (b"<HTML", "it is a web page"),
    (b"<?xml", "it is XML"),
    (b"%PDF", "it is a PDF"),
    (b"%!PS", "it is PostScript"),
    (b"PK\x03\x04", "it is a zip file"),
    (b"\x1f\x8b", "it is a gzip file"),
    (b"8BPS", f"it is a Photoshop file: {_CONVERT}"),
)  # fmt: skip


Image.init()
if importlib.util.find_spec("pillow_heif") is not None:
    importlib.import_module("pillow_heif").register_heif_opener()

# As `Image.open(formats=...)` takes them.
FORMATS = tuple(each for each in _WANTED if each in Image.OPEN)

# Endings of the files that are read as images, in lower case: .jpg and so on. MPO is JPEG with more images behind it.
EXTENSIONS = frozenset(end for end, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO"))


def advice(ending: str) -> str | None:
    """What to do about pictures of an ending (lower case) that are not read here; None if it is no picture's."""
    return None if ending in EXTENSIONS else _ADVICE.get(ending)


def what_it_is(start: bytes) -> str:
    """What a file is that is no image, of its first bytes; empty if that cannot be told."""
    if not start:
        return "it is empty"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
        return f"it is a HEIC image: {_HEIF}"
    if not any(start):
        return "it begins with zeros"
    return next((what for begin, what in _STARTS if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(begin)), "")
