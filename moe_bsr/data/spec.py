"""Task files: read a YAML file of `tasks/` into a `TaskSpec`, and check it before any data are opened.

`TaskSpec` has the keys that all task files share. Each kind of source has a subclass in `sources/`, whose fields are
the keys of that source. The registry `SOURCES` lists them. A new source is one file in that folder:

    @SOURCES.register("my_source")
    @dataclass(frozen=True, kw_only=True)
    class MyTask(TaskSpec):
        url: str

        def open(self, root, download): return TaskImages(train=..., test=..., origin=...)
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from moe_bsr.config import ConfigError, is_crop_range, require
from moe_bsr.config.errors import nearest
from moe_bsr.config.reader import convert_section
from moe_bsr.config.registry import Registry
from moe_bsr.config.task_folders import is_folder, name_of, title_of
from moe_bsr.config.yaml_text import read_yaml


class ImageSource(Protocol):
    """Labelled images of one split.

    Attributes:
        labels: int64 (N,), indices into `class_names`.

    A source that reads files also has `encoded(i)`, which returns the bytes of the file, or None if there is none. A
    source that reads from a network also has `expect(places)`, which announces the images that are needed soon.
    """

    labels: np.ndarray
    class_names: list[str]

    @property
    def names(self) -> Sequence[str] | None:
        """Name of each image, such as `<class>/<file>`; None if images have no names.

        Its hash decides whether an image is for training or validation, and a run records the names.
        """
        ...

    @property
    def sizes(self) -> np.ndarray | None:
        """Size of each encoded image in bytes, int64 (N,); None if there are no files."""
        ...

    def __len__(self) -> int: ...

    def image(self, i: int) -> np.ndarray:
        """Return image i, decoded: uint8 (H, W, 3) RGB. Each image may have its own size."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskImages:
    """The splits of a task's source.

    Attributes:
        test: None if the source has no test split. Then a part of `train` is used (`TaskSpec.test_fraction`).
        val: None if the source has no validation split. Then a part of `train` is used.
        origin: where the images come from, in one line.
        unused: one line for each kind of thing that was found and is not used.
    """

    train: ImageSource
    test: ImageSource | None
    val: ImageSource | None = None
    origin: str
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """The keys that every task file may have. `name` is the name of the file. Raises ConfigError for invalid values.

    Attributes:
        classes: number of classes; if given, it is checked against the data.
        test_fraction: share of the images set aside as the test split if the source has none; null means 0.2.
        crop_scale: smallest and largest share of an image's area that a training crop covers.
        flip: whether half of the training crops are mirrored.
        bits: bit depth of the values in 16-bit images, for cameras that measure 10, 12 or 14 bits. 16 states that dark
            images are really dark. With null, an image that may be either raises an error.
        may_change: keys that may differ when a run is resumed.
    """

    may_change: ClassVar[tuple[str, ...]] = ("title", "license", "homepage", "path")

    name: str
    title: str
    classes: int | None = None
    license: str | None = "not stated"
    homepage: str | None = ""
    crop_scale: list[float] = field(default_factory=lambda: [0.35, 1.0])
    flip: bool = True
    test_fraction: float | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        require(self.classes is None or self.classes >= 2, "classes", self.classes, "at least 2")
        require(is_crop_range(self.crop_scale), "crop_scale", self.crop_scale, "[low, high], 0 < low <= high <= 1")
        share = self.test_fraction
        require(share is None or 0 < share < 1, "test_fraction", share, "null (0.2) or above 0 and below 1")
        require(self.bits is None or 8 <= self.bits <= 16, "bits", self.bits, "null or 8 to 16")

    @property
    def source(self) -> str:
        """The value of `source` in task files of this class."""
        return next((kind for kind in SOURCES if SOURCES[kind] is type(self)), "")

    def open(self, root: Path, download: bool = False) -> TaskImages:
        """Open every split that the source has.

        Args:
            root: the data root, which relative paths start from.
            download: whether missing data may be downloaded.
        Raises:
            FileNotFoundError: data are missing. The message says what is expected where.
            ValueError: the data are damaged or contradictory.
        """
        raise NotImplementedError(f"task {self.name}: source {self.source!r} has no method open")

    def folder(self, root: Path) -> Path | None:
        """Return the folder with the images of this task, or None if it has no folder of its own."""
        return None


SOURCES: Registry[type[TaskSpec]] = Registry("source")


def load_spec(name_or_path: str | Path) -> TaskSpec:
    """Load a task by its name, by the path of its .yaml file, or by a folder of images (a path that ends with a slash).

    A name is looked up in `tasks/` of the current directory, then among the tasks of the package.
    Raises FileNotFoundError, whose message lists the tasks there are, and ConfigError for invalid keys and values.
    """
    path = Path(name_or_path).expanduser()
    if is_folder(str(name_or_path)):
        return _of_folder(path.resolve(), name_of(str(name_or_path)))
    if path.suffix not in (".yaml", ".yml"):
        path = _find(str(name_or_path))
    elif not path.is_file():
        raise FileNotFoundError(f"task file {path} does not exist")
    entries = read_yaml(path, f"task file {path}")
    if not isinstance(entries, dict):
        raise ConfigError(f"task file {path}: expected keys and values such as 'title: My pictures'")
    try:
        return spec_from(path.stem, entries)
    except ConfigError as error:
        raise ConfigError(f"task {path.stem}: {error}") from None


def spec_from(name: str, entries: dict) -> TaskSpec:
    """Build a task from the keys and values of a task file. Raises ConfigError."""
    kinds = ", ".join(SOURCES)
    if "source" not in entries:
        raise ConfigError(f"the key 'source' is missing: one of {kinds}")
    source = entries["source"]
    known = isinstance(source, str) and source in SOURCES
    require(known, "source", source, f"one of {kinds}{nearest(source, SOURCES)}")
    cls = SOURCES[source]
    allowed = _keys(cls)
    for key in entries:
        if key not in allowed:
            elsewhere = [kind for kind in SOURCES if key in _keys(SOURCES[kind])]
            hint = f": it belongs to source {' or '.join(elsewhere)}" if elsewhere else nearest(key, allowed)
            raise ConfigError(f"unknown key {key} for source {source}{hint} (allowed: {', '.join(allowed)})")
    return convert_section({key: value for key, value in entries.items() if key != "source"}, cls, "", name=name)


def _of_folder(folder: Path, name: str) -> TaskSpec:
    """Return the task that `moe-bsr init` would write for a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"task folder {folder} does not exist")
    return spec_from(name, {"title": title_of(name), "source": "folder", "path": str(folder)})


def _keys(cls: type[TaskSpec]) -> list[str]:
    return ["source", *(each.name for each in dataclasses.fields(cls) if each.name != "name")]


def _find(name: str) -> Path:
    package = Path(__file__).resolve().parents[1]
    installed = package / "tasks"  # a checkout has `tasks/` beside the package instead
    folders = [Path("tasks"), installed if installed.is_dir() else package.parent / "tasks"]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise FileNotFoundError(
        f"task {name!r}: no {name}.yaml in {' or '.join(map(str, folders))} (a path to a .yaml file works as "
        f"well); tasks found: {', '.join(known) or 'none'}{nearest(name, known)}"
    )
