"""Read and write a shared run as a zip file. The file is not trusted: only files of the shared form are unpacked.

Unpacked files get fixed names, never a path from the archive. Links, folders and other files are ignored. A file's
stated size is checked before unpacking and enforced during it.
"""

import contextlib
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from moe_bsr.config import ConfigError
from moe_bsr.runs.checkpoint import CheckpointError
from moe_bsr.runs.shared_form import CONFIG, FILES, MOST_BYTES, WEIGHTS
from moe_bsr.runtime import files

EXPANSION = 20  # limit of unpacked to packed size for the weights, which hardly compress
CHUNK = 2**20


@contextlib.contextmanager
def opened(run: Path) -> Iterator[Path]:
    """Context that gives the folder of a run. A zip file is unpacked to a temporary folder, deleted at the end.

    Raises:
        ConfigError: the file is no zip file of a shared run, or is not safe to unpack.
    """
    if not run.is_file():
        yield run
        return
    with tempfile.TemporaryDirectory(prefix="moe_bsr_") as name:
        try:
            with zipfile.ZipFile(run) as archive:
                _unpack(archive, Path(name))
        except ConfigError as error:
            raise ConfigError(f"{run}: {error}") from None
        except Exception as error:  # zipfile raises exceptions of many types for damaged or forged files
            reason = str(error) or type(error).__name__
            raise ConfigError(f"{run} is neither a run folder nor a zip file of one ({reason})") from None
        try:
            yield Path(name)
        except (ConfigError, CheckpointError) as error:  # name the zip file, not the temporary folder
            raise type(error)(str(error).replace(name, str(run))) from error


def require_folder(run: Path, reason: str) -> None:
    """Raise ConfigError if a run is a zip file, with how to unpack it.

    Args:
        reason: why a folder is needed.
    """
    if files.kind(run) == "a file":
        raise ConfigError(
            f"{run}: {reason}; unpack it first: python -m zipfile -e {run} {run.stem} (the run is the folder in "
            f"{run.stem} that has a {CONFIG})"
        )


def write(folder: Path, file: Path) -> None:
    """Pack the files of a shared run. In the archive they are in a folder with the zip file's name.

    The zip file is written under another name and renamed when it is complete.
    """
    temporary = file.with_name(file.name + ".tmp")
    files.remove(temporary)
    try:
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as archive:
            for name in FILES:
                if (folder / name).is_file():
                    kind = zipfile.ZIP_STORED if name == WEIGHTS else zipfile.ZIP_DEFLATED
                    archive.write(folder / name, f"{file.stem}/{name}", kind)
        files.sync(temporary)
        temporary.rename(file)
    finally:
        files.remove(temporary)


def _unpack(archive: zipfile.ZipFile, folder: Path) -> None:
    members: dict[str, zipfile.ZipInfo] = {}
    configs = [PurePosixPath(each.filename) for each in archive.infolist() if each.filename.endswith(CONFIG)]
    places = sorted((path.parent for path in configs if path.name == CONFIG), key=lambda place: len(place.parts))
    if not places:
        raise ConfigError(f"it has no {CONFIG}, so it is no run that moe-bsr share wrote")
    for member in archive.infolist():
        path = PurePosixPath(member.filename)
        if path.parent == places[0] and path.name in FILES:
            if path.name in members:
                raise ConfigError(f"it has two files {path.name}")
            members[path.name] = member
    for name, member in members.items():
        _check(name, member)
        with archive.open(member) as packed, open(folder / name, "xb") as out:
            left = member.file_size
            while content := packed.read(min(CHUNK, left + 1)):
                left -= len(content)
                if left < 0:
                    raise ConfigError(f"its {name} is larger than the archive states")
                out.write(content)


def _check(name: str, member: zipfile.ZipInfo) -> None:
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise ConfigError(f"its {name} is no ordinary file")
    if member.flag_bits & 1:
        raise ConfigError(f"its {name} is encrypted: unpack it first")
    if member.file_size > (EXPANSION * member.compress_size if name == WEIGHTS else MOST_BYTES):
        raise ConfigError(
            f"its {name} would take {member.file_size} bytes, unpacked from {member.compress_size}, which is too much"
        )
