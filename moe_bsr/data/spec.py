"""A task as its YAML file in `tasks/` describes it, checked before anything is opened."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moe_bsr.config import ConfigError, is_crop_range, require
from moe_bsr.config.reader import convert_section, nearest, parse

# source -> (keys it needs, further keys it may have), beside those every task has
KEYS = {
    "torchvision": ({"dataset"}, {"splits"}),
    "folder": ({"path"}, set()),
    "packed": ({"path"}, set()),
    "generated": ({"family", "classes", "train", "test"}, {"seed"}),
}
KEYS_OF_ALL = {"title", "source", "classes", "license", "homepage", "crop_scale", "flip"}


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """The keys of a task file; `name` is the name of the file. Raises ConfigError if impossible."""

    name: str
    title: str
    source: Literal[tuple(KEYS)]
    classes: int | None = None  # checked against the data where given
    license: str | None = "not stated"
    homepage: str | None = ""
    crop_scale: list[float] = field(default_factory=lambda: [0.35, 1.0])  # a crop's share of the area
    flip: bool = True  # mirror half of the training crops
    dataset: str | None = None  # torchvision: name of the class
    splits: dict[str, list[str]] | None = None  # torchvision: its splits that make train and test
    path: str | None = None  # folder, packed: absolute, or below the data root
    family: str | None = None  # generated
    train: int | None = None  # generated: number of images
    test: int | None = None
    seed: int = 0

    def __post_init__(self):
        for key in sorted(KEYS[self.source][0]):
            if getattr(self, key) is None:
                raise ConfigError(f"source {self.source} needs the key {key!r}")
        for key in ("classes", "train", "test"):
            count = getattr(self, key)
            require(count is None or count >= 2, key, count, "at least 2")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        require(is_crop_range(self.crop_scale), "crop_scale", self.crop_scale, "[low, high], 0 < low <= high <= 1")
        splits = self.splits or {"train": ["train"], "test": ["test"]}
        require(
            splits.keys() == {"train", "test"} and all(splits.values()),
            "splits",
            splits,
            "the keys train and test, each a list of split names",
        )
        both = sorted(set(splits["train"]) & set(splits["test"]))
        require(not both, "splits", splits, f"no split may be in train and in test, as {both} are")
        object.__setattr__(self, "splits", splits)


def load_spec(name_or_path: str | Path) -> TaskSpec:
    """The task of that name, or of that .yaml file.

    A name is looked up in `tasks/` of the current directory, then in the one beside the package.
    Raises FileNotFoundError listing what exists, ConfigError for keys and values that cannot be.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = _find(str(name_or_path))
    elif not path.is_file():
        raise FileNotFoundError(f"task file {path} does not exist")
    entries = parse(path.read_text(encoding="utf-8"), f"task file {path}")
    if not isinstance(entries, dict):
        raise ConfigError(f"task file {path}: expected keys and values such as 'title: My pictures'")
    try:
        spec = convert_section(entries, TaskSpec, "", name=path.stem)
        allowed = KEYS_OF_ALL.union(*KEYS[spec.source])
        if strangers := sorted(entries.keys() - allowed):
            raise ConfigError(
                f"key {strangers[0]!r} means nothing for source {spec.source}; allowed are {', '.join(sorted(allowed))}"
            )
    except ConfigError as error:
        raise ConfigError(f"task {path.stem}: {error}") from None
    return spec


def _find(name: str) -> Path:
    folders = [Path("tasks"), Path(__file__).resolve().parents[2] / "tasks"]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise FileNotFoundError(
        f"task {name!r}: no {name}.yaml in {' or '.join(map(str, folders))} (a path to a .yaml file works as "
        f"well); there are {', '.join(known) or 'none'}{nearest(name, known)}"
    )
