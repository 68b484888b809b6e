"""Find the task, configuration and sweep files of the package, from any working directory.

In a clone (and after `pip install -e`) they are in `tasks/` and `configs/` beside the package. In a wheel they are
inside the package, where setup.py puts them.
"""

import os
from pathlib import Path
from typing import Literal

Kind = Literal["tasks", "configs", "configs/sweeps"]

PACKAGE = Path(__file__).resolve().parents[1]


def folder(kind: Kind) -> Path:
    """Return the folder with the packaged files of a kind."""
    inside = PACKAGE / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def names(kind: Kind) -> list[str]:
    """Return the names of the packaged files of a kind, without `.yaml`."""
    return sorted(path.stem for path in folder(kind).glob("*.yaml"))


def find(kind: Kind, name: str | Path) -> Path | None:
    """Return the packaged file of a name (`quickstart`, `quickstart.yaml` or `configs/quickstart.yaml`), or None."""
    path = Path(name)
    if path.parent not in (Path(), Path(kind)) or path.suffix not in ("", ".yaml"):
        return None
    found = folder(kind) / f"{path.stem if path.suffix else path.name}.yaml"
    return found if os.path.isfile(found) else None  # of a name that no file can have, `Path.is_file` raises
