"""A task as its YAML file in `tasks/` describes it, checked before anything is opened.

Every kind of source has its own class of task: what all tasks say is in `TaskSpec`, the source's own keys
are the fields of its subclass in `sources/`. `SOURCES` is the only list of them. A new source is one file
there:

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
from moe_bsr.config.task_folders import folder_name, is_folder, title_of
from moe_bsr.config.yaml_text import read_yaml


class ImageSource(Protocol):
    """Labelled images of one split.

    Attributes:
        labels: int64 (N,), indices into `class_names`.

    A source that reads files also has `encoded(i)`: the bytes of the file, or None where there is none. One that reads
    from afar has `expect(places)`, and is told by it which images it will soon be asked for.
    """

    labels: np.ndarray
    class_names: list[str]

    @property
    def names(self) -> Sequence[str] | None:
        """What each image is called, as `<class>/<file>`: it decides between training and validation, and a run
        remembers it. None where images have no names but their position."""
        ...

    @property
    def sizes(self) -> np.ndarray | None:
        """Bytes of each encoded image, int64 (N,); None where there are no files."""
        ...

    def __len__(self) -> int: ...

    def image(self, i: int) -> np.ndarray:
        """Image i decoded: uint8 (H, W, 3) RGB; sizes may differ."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskImages:
    """What a task's source holds.

    Attributes:
        test: None where the source has no test split: it is taken from `train` then (`TaskSpec.test_fraction`).
        val: None where the source has no validation split: it is taken from `train` then.
        origin: where the images come from, in one line.
        unused: what lies there and is not used, a line each.
    """

    train: ImageSource
    test: ImageSource | None
    val: ImageSource | None = None
    origin: str
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """The keys that every task file may have; `name` is the name of the file. Raises ConfigError if impossible.

    Attributes:
        classes: their number, checked against the data where given.
        test_fraction: share of the images set aside as the test split, where the source has none; null is 0.2.
        crop_scale: the least and the largest share of an image's area that a training crop has.
        flip: whether half of the training crops are mirrored.
        bits: of the numbers in images of 16 bits, where cameras that measure 10, 12 or 14 wrote them; 16 says that
            dark images are just dark; null refuses images that might be either.
    """

    may_change: ClassVar[tuple[str, ...]] = ("title", "license", "homepage", "path")  # while a run rests

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
        """The name that task files of this kind give as their source."""
        return next((kind for kind in SOURCES if SOURCES[kind] is type(self)), "")

    def open(self, root: Path, download: bool = False) -> TaskImages:
        """The images of each split that the source has.

        Args:
            root: the data root, for relative paths.
            download: whether what is missing may be fetched.
        Raises:
            FileNotFoundError: says what is expected where. ValueError: damaged or contradictory data.
        """
        raise NotImplementedError(f"task {self.name}: source {self.source!r} does not say how it is opened")

    def folder(self, root: Path) -> Path | None:
        """Where the images of this task lie, if they have a folder of their own."""
        return None


SOURCES: Registry[type[TaskSpec]] = Registry("source")


def load_spec(name_or_path: str | Path) -> TaskSpec:
    """The task of that name, of that .yaml file, or of the images in that folder, which is written with a slash.

    A name is looked up in `tasks/` of the current directory, then among the tasks that come with the package.
    Raises FileNotFoundError listing what exists, ConfigError for keys and values that cannot be.
    """
    path = Path(name_or_path)
    if is_folder(str(name_or_path)):
        return _of_folder(path.expanduser().resolve())
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
    """The task that these keys and values of a task file describe. Raises ConfigError."""
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


def _of_folder(folder: Path) -> TaskSpec:
    """What `moe-bsr init` would write of it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"task folder {folder} does not exist")
    name = folder_name(folder)
    return spec_from(name, {"title": title_of(name), "source": "folder", "path": str(folder)})


def _keys(cls: type[TaskSpec]) -> list[str]:
    return ["source", *(each.name for each in dataclasses.fields(cls) if each.name != "name")]


def _find(name: str) -> Path:
    package = Path(__file__).resolve().parents[1]
    installed = package / "tasks"  # in a checkout they lie beside the package
    folders = [Path("tasks"), installed if installed.is_dir() else package.parent / "tasks"]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise FileNotFoundError(
        f"task {name!r}: no {name}.yaml in {' or '.join(map(str, folders))} (a path to a .yaml file works as "
        f"well); there are {', '.join(known) or 'none'}{nearest(name, known)}"
    )
