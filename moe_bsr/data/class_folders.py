"""List all images below a folder, and count everything else that is found there.

Sub-folders are searched at any depth. Symbolic links are followed, except those that lead back to a folder above.
"""

import os
from collections.abc import Callable
from pathlib import Path

from moe_bsr.data.formats import EXTENSIONS, advice
from moe_bsr.data.image_files import file_kind
from moe_bsr.data.unused import Unused

# Names, in lower case, of files and folders that file managers, archives and network disks create.
_LITTER = {
    "__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "#recycle",
    "#snapshot", "lost+found", "icon\r", "__pycache__",
}  # fmt: skip


def entries(folder: str, unused: Unused) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
    """Return the files and the folders in a folder, each sorted by name. Links are followed.

    Anything that is neither is added to `unused`, and so is `folder` itself if it cannot be opened.
    """
    files, folders = [], []
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if is_litter(entry.name):
                    continue
                if entry.is_file():
                    files.append(entry)
                elif entry.is_dir():
                    folders.append(entry)
                else:
                    kind = file_kind(Path(entry.path))
                    unused.add(f"entry that is {kind}", f"entries, each of them {kind}", entry.path)
    except OSError as error:
        unused.add("folder that cannot be opened", "folders that cannot be opened", folder, error.strerror or "")
    return sorted(files, key=_name), sorted(folders, key=_name)


def is_image(name: str) -> bool:
    """Return whether the ending of a file name is one of `EXTENSIONS`."""
    return _ending(name) in EXTENSIONS


def is_picture(name: str) -> bool:
    """Return whether the ending of a file name is that of an image format, also of one that cannot be read here."""
    return is_image(name) or advice(_ending(name)) is not None


def images_below(folder: str, unused: Unused, wanted: Callable[[str], bool] = is_image) -> list[str]:
    """Return the paths of all images in a folder and its sub-folders, sorted part by part.

    Args:
        wanted: decides by a file's name whether it is an image. Other files are added to `unused`.
    """
    found: list[str] = []
    waiting = [(folder, frozenset[tuple[int, int]]())]
    while waiting:
        place, above = waiting.pop()
        try:
            about = os.stat(place)
        except OSError as error:
            unused.add("folder that cannot be opened", "folders that cannot be opened", place, error.strerror or "")
            continue
        own = (about.st_dev, about.st_ino)
        if own in above:
            unused.add("link back to a folder above", "links back to a folder above", place)
            continue
        files, folders = entries(place, unused)
        for entry in files:
            if wanted(entry.name):
                found.append(entry.path)
            else:
                count_no_image(entry.path, unused)
        waiting += [(entry.path, above | {own}) for entry in folders]
    return sorted(found, key=lambda path: path.split(os.sep))


def is_litter(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or was created by a program such as a file manager."""
    return name[:1] == "." or name.lower() in _LITTER


def count_no_image(path: str, unused: Unused) -> None:
    """Add a file that is not a readable image to `unused`: by its ending if that belongs to an image format."""
    ending = _ending(path)
    if (what_to_do := advice(ending)) is not None:
        unused.add(f"{ending} file", f"{ending} files", path, f"cannot be read here: {what_to_do}")
    else:
        unused.add("file that is not an image", "files that are not images", path)


def count_loose(entry: os.DirEntry, unused: Unused) -> None:
    """Add a file that lies outside of the class folders to `unused`."""
    if is_image(entry.name):
        unused.add("image outside of a class folder", "images outside of a class folder", entry.path)
    else:
        count_no_image(entry.path, unused)


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _name(entry: os.DirEntry) -> str:
    return entry.name
