"""The image formats that can be read, and advice for the others.

Pillow chooses a decoder by a file's first bytes, not by its name. Here it may only choose among `FORMATS`: raster
formats that are decoded in this process. A format that starts another program (EPS) or has no pixels (WMF) is not among
them. HEIC photos can be read if the package pillow-heif is installed.
"""

import importlib.util

from PIL import Image

# Pillow tries them in this order. TGA files have no signature, so TGA is last.
_WANTED = (
    "JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO", "PCX", "QOI", "SGI",
    "TGA",
)  # fmt: skip

_CONVERT = "convert them to JPEG or PNG"
_HEIF = f"pip install pillow-heif, or {_CONVERT}"
_RAW = "camera raw: export them as JPEG or TIFF"

# Endings of image files that cannot be read -> what to do.
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

# First bytes of files that are not images although their names say so -> what they are.
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

# The argument for `Image.open(formats=...)`.
FORMATS = tuple(each for each in _WANTED if each in Image.OPEN)

# Endings, in lower case, of files that are read as images: .jpg and so on. MPO is a JPEG followed by more images.
EXTENSIONS = frozenset(end for end, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO"))


def advice(ending: str) -> str | None:
    """Return what to do with image files that cannot be read, by their ending in lower case.

    None means that files with this ending can be read, or that they are not images.
    """
    return None if ending in EXTENSIONS else _ADVICE.get(ending)


def what_it_is(start: bytes) -> str:
    """Return what a file that is not a readable image really is, judged by its first bytes; "" if that is unknown."""
    if not start:
        return "it is empty"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
        return f"it is a HEIC image: {_HEIF}"
    if not any(start):
        return "it begins with zeros"
    return next((what for begin, what in _STARTS if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(begin)), "")
