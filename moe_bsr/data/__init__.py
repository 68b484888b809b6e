"""Tasks and their images: sources, the packed form, splits, transforms and the loader."""

from moe_bsr.data.loader import Loader
from moe_bsr.data.packed import PackedSource
from moe_bsr.data.sources import FolderSource, TorchvisionSource, UnreadableImage
from moe_bsr.data.spec import TaskSpec, load_spec
from moe_bsr.data.task import Split, TaskData, carve, load_task, open_sources
from moe_bsr.data.transforms import Pipeline

__all__ = [
    "FolderSource",
    "Loader",
    "PackedSource",
    "Pipeline",
    "Split",
    "TaskData",
    "TaskSpec",
    "TorchvisionSource",
    "UnreadableImage",
    "carve",
    "load_spec",
    "load_task",
    "open_sources",
]
