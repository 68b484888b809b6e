"""Source "packed": all encoded images of a split in one file (`moe_bsr/data/packed.py` documents the format)."""

from dataclasses import dataclass
from pathlib import Path

from moe_bsr.data.packed import open_pack
from moe_bsr.data.spec import SOURCES, TaskImages, TaskSpec


@SOURCES.register("packed")
@dataclass(frozen=True, kw_only=True)
class PackedTask(TaskSpec):
    """A pack: the folder `path` (absolute, or below the data root) with train.npz, classes.txt and so on."""

    path: str

    def folder(self, root: Path) -> Path:
        return root / Path(self.path).expanduser()

    def open(self, root: Path, download: bool = False) -> TaskImages:
        return open_pack(self.folder(root), self.bits)
