"""Tasks and their images: sources, the packed form, splits, transforms and the loader."""

from moe_bsr.data.loader import Batch, Loader
from moe_bsr.data.packed import PackedSource
from moe_bsr.data.sources import FolderSource, TorchvisionSource, UnreadableImage
from moe_bsr.data.spec import TaskSpec, load_spec
from moe_bsr.data.task import Split, TaskData, load_task, open_sources, split_validation
from moe_bsr.data.transforms import ImageTransforms

__all__ = [
    "Batch",
    "FolderSource",
    "Loader",
    "PackedSource",
    "ImageTransforms",
    "Split",
    "TaskData",
    "TaskSpec",
    "TorchvisionSource",
    "UnreadableImage",
    "split_validation",
    "load_spec",
    "load_task",
    "open_sources",
]
