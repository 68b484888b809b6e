"""Decode every image of a task, to find unreadable and suspicious ones before training."""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_bsr.data.image_files import UnreadableImage
from moe_bsr.data.splits import SPLITS
from moe_bsr.data.task import Split, TaskData
from moe_bsr.runtime.device import cores

TINY = 8  # images with a shorter side below this many pixels are reported
AT_ONCE = 1024  # images handed to the threads at a time
EXAMPLES = 5  # pairs of equal images that are named in the result


@dataclass(frozen=True, slots=True)
class _Image:
    """Findings about one image. For an unreadable one only split, name, label and `error` are set."""

    split: str
    name: str
    label: int
    error: str = ""
    width: int = 0
    height: int = 0
    constant: bool = False
    digest: bytes = b""


def check_task(data: TaskData, on_image: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Decode all images of all splits, in as many threads as there are cores.

    Args:
        on_image: called after each image, for a progress bar.
    Returns:
        Plain data, ready for JSON:
        `splits`: {name: {images, smallest, largest}}; the last two are (width, height) of the images of least and
        largest area.
        `broken`: {split, image, reason} of each unreadable image.
        `constant`, `tiny`: {split, image} of each image of a single color, and of each whose shorter side is below
        8 pixels.
        `shared`: {splits, images, examples} for two splits: how many images of the second have the same pixels as one
        of the first.
        `two_labels`: {images, examples}: how many images have the same pixels as an earlier one of another class.
    """
    found: list[_Image] = []
    with ThreadPoolExecutor(cores()) as pool:
        for name in SPLITS:
            split: Split = getattr(data, name)
            for start in range(0, len(split), AT_ONCE):
                part = range(start, min(start + AT_ONCE, len(split)))
                split.expect(split.index[part].tolist())
                for image in pool.map(lambda position, name=name, split=split: _look(split, name, position), part):
                    found.append(image)
                    on_image()
    sound = [image for image in found if not image.error]
    return {
        "task": data.name,
        "origin": data.origin,
        "classes": len(data.class_names),
        "notes": data.notes,
        "splits": {name: _sizes([image for image in found if image.split == name]) for name in SPLITS},
        "broken": [{"split": i.split, "image": i.name, "reason": i.error} for i in found if i.error],
        "constant": _listed([image for image in sound if image.constant]),
        "tiny": _listed([image for image in sound if min(image.width, image.height) < TINY]),
        **_repeated([image for image in sound if not image.constant], data.class_names),
    }


def _look(split: Split, split_name: str, position: int) -> _Image:
    index, names, label = int(split.index[position]), split.source.names, int(split.labels[position])
    name = names[index] if names is not None and index >= 0 else f"image {position}"
    try:
        pixels = split.source.image(split.place(position))
    except UnreadableImage as error:
        return _Image(split_name, name, label, str(error))
    height, width = pixels.shape[:2]
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16, salt=str(width).encode()).digest()
    constant = bool((pixels.min((0, 1)) == pixels.max((0, 1))).all())
    return _Image(split_name, name, label, "", width, height, constant, digest)


def _sizes(images: list[_Image]) -> dict[str, Any]:
    sides = sorted(((i.width, i.height) for i in images if not i.error), key=lambda side: side[0] * side[1])
    return {"images": len(images)} | ({"smallest": sides[0], "largest": sides[-1]} if sides else {})


def _listed(images: list[_Image]) -> list[dict[str, str]]:
    return [{"split": image.split, "image": image.name} for image in images]


def _repeated(images: list[_Image], class_names: list[str]) -> dict[str, Any]:
    """Find images with equal pixels in different splits or with different labels."""
    by_split: dict[tuple[str, str], list[list[str]]] = defaultdict(list)
    two_labels: list[list[str]] = []
    first: dict[bytes, dict[str, _Image]] = defaultdict(dict)
    for image in images:
        before = first[image.digest]
        for split, other in before.items():
            if split != image.split:
                by_split[split, image.split].append([other.name, image.name])
        if contrary := [each for each in before.values() if each.label != image.label]:
            two_labels.append([f"{each.name} ({class_names[each.label]})" for each in (contrary[0], image)])
        before.setdefault(image.split, image)
    return {
        "shared": [
            {"splits": list(splits), "images": len(pairs), "examples": pairs[:EXAMPLES]}
            for splits, pairs in by_split.items()
        ],
        "two_labels": {"images": len(two_labels), "examples": two_labels[:EXAMPLES]},
    }
