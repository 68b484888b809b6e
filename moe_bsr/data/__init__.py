"""Tasks and their images: sources, the packed form, splits, transforms and the loader."""

from moe_bsr.data import sources  # fills SOURCES
from moe_bsr.data.image_files import UnreadableImage, decode
from moe_bsr.data.loader import Batch, Loader
from moe_bsr.data.spec import SOURCES, ImageSource, TaskSpec, load_spec
from moe_bsr.data.task import Split, TaskData, load_task, open_sources, split_validation
from moe_bsr.data.transforms import ImageTransforms

__all__ = [
    "SOURCES",
    "Batch",
    "ImageSource",
    "ImageTransforms",
    "Loader",
    "Split",
    "TaskData",
    "TaskSpec",
    "UnreadableImage",
    "decode",
    "load_spec",
    "load_task",
    "open_sources",
    "sources",
    "split_validation",
]
