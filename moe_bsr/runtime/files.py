"""Files that a crash cannot leave half-written."""

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Replace a text file by one rename: a reader, or a crash, meets the old text or the new one."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.rename(file)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
