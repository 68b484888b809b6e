"""The task, configuration and sweep files that come with the package, found from any directory.

In a clone (and after `pip install -e`) they lie in `tasks/` and `configs/` beside the package; a wheel
carries them inside it (setup.py puts them there).
"""

from pathlib import Path
from typing import Literal

Kind = Literal["tasks", "configs", "configs/sweeps"]

PACKAGE = Path(__file__).resolve().parents[1]


def folder(kind: Kind) -> Path:
    """Where the packaged files of a kind lie."""
    inside = PACKAGE / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def names(kind: Kind) -> list[str]:
    """Names of the packaged files of a kind, without `.yaml`."""
    return sorted(path.stem for path in folder(kind).glob("*.yaml"))


def find(kind: Kind, name: str | Path) -> Path | None:
    """The packaged file of that name; `quickstart`, `quickstart.yaml` and `configs/quickstart.yaml` name one file."""
    path = Path(name)
    if path.parent not in (Path(), Path(kind)) or path.suffix not in ("", ".yaml"):
        return None
    found = folder(kind) / f"{path.stem if path.suffix else path.name}.yaml"
    return found if found.is_file() else None


def find_config(path: str | Path) -> Path:
    """The configuration file or run folder of that path if it is here, else the packaged one, else the path itself."""
    path = Path(path)
    return path if path.is_file() or (path / "config.yaml").is_file() else find("configs", path) or path
