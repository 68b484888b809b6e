"""Tasks and their images: sources, packs, splits, transforms and the loader."""

from moe_bsr.data import sources  # registers every source in SOURCES
from moe_bsr.data.addresses import LostData
from moe_bsr.data.image_files import UnreadableImage, decode
from moe_bsr.data.loader import Batch, Loader
from moe_bsr.data.spec import SOURCES, ImageSource, TaskImages, TaskSpec, load_spec
from moe_bsr.data.task import Split, TaskData, load_task, open_images
from moe_bsr.data.transforms import ImageTransforms

__all__ = [
    "SOURCES",
    "Batch",
    "ImageSource",
    "ImageTransforms",
    "Loader",
    "LostData",
    "Split",
    "TaskData",
    "TaskImages",
    "TaskSpec",
    "UnreadableImage",
    "decode",
    "load_spec",
    "load_task",
    "open_images",
    "sources",
]
