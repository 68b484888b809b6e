"""Methods to compare: each has a title, a source, and changes to a base configuration.

They are read from one file, `configs/methods/all.yaml` of the package or a user's own, as strictly as a configuration.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_bsr.config import packaged
from moe_bsr.config.errors import ConfigError, nearest, require
from moe_bsr.config.files import replace
from moe_bsr.config.probe import probe_config
from moe_bsr.config.reader import convert_section
from moe_bsr.config.schema import Config
from moe_bsr.config.yaml_text import read_yaml


@dataclass(kw_only=True, slots=True)
class Published:
    """Published result of a paper: top-1 accuracy in percent, and memory in MB, counted as `rule` says."""

    backbone: str
    task: str
    top1: float
    memory_mb: float
    rule: str


@dataclass(kw_only=True, slots=True)
class Method:
    """One method.

    Attributes:
        source: paper and section.
        code: "timm" is plain timm code without this package's, which no configuration describes. "probe" is the linear
            probe of the changed configuration, solved to its optimum.
        changes: keys and values that replace those of the base configuration.
        lr_scale: factor on the base's train.lr.
        published: results of papers, for comparison.
    """

    title: str
    source: str = ""
    code: Literal["ours", "timm", "probe"] = "ours"
    changes: dict = field(default_factory=dict)
    lr_scale: float = 1.0
    published: list[Published] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(self.lr_scale > 0, "lr_scale", self.lr_scale, "above 0")
        require(self.code != "timm" or not self.changes, "changes", self.changes, "none with code: timm")

    def of(self, base: Config) -> Config:
        """Return `base` with this method's changes. In sections single keys are replaced, other values as a whole.

        Raises:
            ConfigError: the result is not a valid configuration.
        """
        values: dict[str, Any] = {"train__lr": self.lr_scale * base.train.lr}
        for key, value in self.changes.items():
            is_section = isinstance(value, dict) and dataclasses.is_dataclass(getattr(base, key, None))
            values |= {f"{key}__{inner}": each for inner, each in value.items()} if is_section else {key: value}
        config = replace(base, **values)
        return probe_config(config) if self.code == "probe" else config


def read(file: str | Path | None = None, names: list[str] | None = None) -> dict[str, Method]:
    """Read the methods of a file, by name.

    Args:
        file: None means the package's file.
        names: the methods to read, in this order; None means all.
    Raises:
        ConfigError: there is no such file, or a key or method is unknown. The message names it.
    """
    path = packaged.folder("configs") / "methods" / "all.yaml" if file is None else Path(file)
    require(path.is_file(), "methods file", str(path), "no such file; the package's is configs/methods/all.yaml")
    tree = read_yaml(path, f"methods file {path.name}")
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"methods file {path.name}: expected names of methods, each with title and changes")
    for name in names or []:
        if name not in tree:
            raise ConfigError(f"method {name!r}: one of {', '.join(map(str, tree))}{nearest(name, map(str, tree))}")
    return {name: convert_section(tree[name], Method, str(name)) for name in (names or tree)}
