"""Methods to be compared: each is a title, a source and what it changes of a base configuration.

They stand in one file, `configs/methods/all.yaml` of the package or one of a user's own, read as strictly as a
configuration is.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_bsr.config import packaged
from moe_bsr.config.errors import ConfigError, nearest, require
from moe_bsr.config.files import replace
from moe_bsr.config.reader import convert_section
from moe_bsr.config.schema import Config
from moe_bsr.config.yaml_text import read_yaml


@dataclass(kw_only=True, slots=True)
class Published:
    """A figure of a paper: accuracy in percent, and memory in MB as `rule` counts it."""

    backbone: str
    task: str
    top1: float
    memory_mb: float
    rule: str


@dataclass(kw_only=True, slots=True)
class Method:
    """Attributes:
    code: "timm" is plain code without anything of ours, which no configuration describes.
    lr_scale: times the base's train.lr.
    """

    title: str
    source: str = ""
    code: Literal["ours", "timm"] = "ours"
    changes: dict = field(default_factory=dict)
    lr_scale: float = 1.0
    published: list[Published] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(self.lr_scale > 0, "lr_scale", self.lr_scale, "above 0")
        require(self.code == "ours" or not self.changes, "changes", self.changes, "none with code: timm")

    def of(self, base: Config) -> Config:
        """The base as this method changes it: a section's keys one by one, any other value as a whole.

        Raises:
            ConfigError: a change that no configuration can have.
        """
        values: dict[str, Any] = {"train__lr": self.lr_scale * base.train.lr}
        for key, value in self.changes.items():
            is_section = isinstance(value, dict) and dataclasses.is_dataclass(getattr(base, key, None))
            values |= {f"{key}__{inner}": each for inner, each in value.items()} if is_section else {key: value}
        return replace(base, **values)


def read(file: str | Path | None = None, names: list[str] | None = None) -> dict[str, Method]:
    """The methods of a file, or some of them in the order of `names`.

    Args:
        file: by default the package's.
    Raises:
        ConfigError: no such file, an unknown key or method. The message names it.
    """
    path = packaged.folder("configs") / "methods" / "all.yaml" if file is None else Path(file)
    require(path.is_file(), "methods file", str(path), "no such file; the package's is configs/methods/all.yaml")
    tree = read_yaml(path, f"methods file {path.name}")
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"methods file {path.name}: expected names of methods, each with title and changes")
    for name in names or []:
        if name not in tree:
            raise ConfigError(f"method {name!r} is none of {', '.join(map(str, tree))}{nearest(name, map(str, tree))}")
    return {name: convert_section(tree[name], Method, str(name)) for name in (names or tree)}
