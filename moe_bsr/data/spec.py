"""A task as its YAML file in `tasks/` describes it, checked before anything is opened."""

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_bsr.strict import parse

# source -> (keys it needs, further keys it may have), beside those every task has
KEYS = {
    "torchvision": ({"dataset"}, {"splits"}),
    "folder": ({"path"}, set()),
    "packed": ({"path"}, set()),
    "generated": ({"family", "classes", "train", "test"}, {"seed"}),
}
KEYS_OF_ALL = {"title", "source", "classes", "licence", "homepage", "crop_scale", "flip"}


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """The keys of a task file; `name` is the name of the file. Raises ValueError if impossible."""

    name: str
    title: str
    source: str
    classes: int | None = None  # checked against the data where given
    licence: str = "not stated"
    homepage: str = ""
    crop_scale: tuple[float, float] = (0.35, 1.0)  # share of the image's area a training crop has
    flip: bool = True  # mirror half of the training crops
    dataset: str | None = None  # torchvision: name of the class
    splits: dict[str, list[str]] | None = None  # torchvision: its splits that make train and test
    path: str | None = None  # folder, packed: absolute, or below the data root
    family: str | None = None  # generated
    train: int | None = None  # generated: number of images
    test: int | None = None
    seed: int = 0

    def __post_init__(self):
        where = f"task {self.name}"
        if self.source not in KEYS:
            raise ValueError(
                f"{where}: source: {self.source!r} is not one of {', '.join(KEYS)}"
                + _nearest(self.source, KEYS)
            )
        for key in sorted(KEYS[self.source][0]):
            if getattr(self, key) is None:
                raise ValueError(f"{where}: source {self.source} needs the key {key!r}")
        for key in ("classes", "train", "test"):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 2):
                raise ValueError(f"{where}: {key}: {value!r} is not a whole number of at least 2")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"{where}: seed: {self.seed!r} is not a whole number of at least 0")
        if type(self.flip) is not bool:
            raise ValueError(f"{where}: flip: {self.flip!r} is neither true nor false")
        for key in ("title", "licence", "homepage", "dataset", "path", "family"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{where}: {key}: {value!r} is not text")
        object.__setattr__(self, "crop_scale", crop_range(self.crop_scale, where))
        self._check_splits(where)

    def _check_splits(self, where: str) -> None:
        splits = self.splits or {"train": ["train"], "test": ["test"]}
        if not isinstance(splits, dict) or set(splits) != {"train", "test"}:
            raise ValueError(f"{where}: splits: {splits!r} has not the keys train and test")
        for key, names in splits.items():
            if not isinstance(names, list) or not names:
                raise ValueError(f"{where}: splits.{key}: {names!r} is not a list of split names")
        if both := set(splits["train"]) & set(splits["test"]):
            raise ValueError(f"{where}: splits: {both.pop()!r} is in train and in test")
        object.__setattr__(self, "splits", splits)


def crop_range(value: Any, where: str) -> tuple[float, float]:
    """`value` as a range of crop areas. Raises ValueError unless 0 < low <= high <= 1."""
    try:
        low, high = (float(share) for share in value)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not 0 < low <= high <= 1:
        raise ValueError(f"{where}: crop_scale: {value!r} is not [low, high], 0 < low <= high <= 1")
    return low, high


def load_spec(name_or_path: str | Path) -> TaskSpec:
    """The task of that name, or of that .yaml file.

    A name is looked up in `tasks/` of the current directory, then in the one beside the package.
    Raises FileNotFoundError listing what exists, ValueError for keys and values that cannot be.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = _find(str(name_or_path))
    elif not path.is_file():
        raise FileNotFoundError(f"task file {path} does not exist")
    entries = parse(path.read_text(encoding="utf-8"), f"task file {path}")
    if not isinstance(entries, dict):
        raise ValueError(f"task file {path}: expected keys and values such as 'title: My pictures'")
    _check_keys(path.stem, entries)
    return TaskSpec(name=path.stem, **entries)


def _find(name: str) -> Path:
    folders = [Path("tasks"), Path(__file__).resolve().parents[2] / "tasks"]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise FileNotFoundError(
        f"task {name!r}: no {name}.yaml in {' or '.join(map(str, folders))}; there are "
        f"{', '.join(known) or 'none'}{_nearest(name, known)}. A path to a .yaml file works as well"
    )


def _check_keys(name: str, entries: dict) -> None:
    where = f"task {name}"
    known = {field.name for field in dataclasses.fields(TaskSpec)} - {"name"}
    for key in entries:
        if key not in known:
            raise ValueError(
                f"{where}: unknown key {key!r}{_nearest(str(key), known)}; "
                f"allowed are {', '.join(sorted(known))}"
            )
    for key in ("title", "source"):
        if key not in entries:
            raise ValueError(f"{where}: the key {key!r} is missing")
    source = entries["source"]
    if isinstance(source, str) and source in KEYS:
        allowed = KEYS_OF_ALL.union(*KEYS[source])
        if strangers := sorted(set(entries) - allowed):
            raise ValueError(
                f"{where}: key {strangers[0]!r} means nothing for source {source}; "
                f"allowed are {', '.join(sorted(allowed))}"
            )


def _nearest(word: str, known) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
