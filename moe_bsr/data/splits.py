"""Which images of a source are held out: decided for each image by a hash of its own name.

No image that is added, removed or renamed moves another one between training, validation and test. So a folder that
grows keeps its splits, and what a model was trained on never becomes what it is measured by. The price is that a
split has its share of the images only on average, in a class as in the whole.
"""

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from moe_bsr.data.spec import ImageSource


def held_out(
    labels: np.ndarray, names: Sequence[str], fraction: float, seed: int, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Split positions 0..N-1 into those kept and those held out, both sorted int64; a pure function.

    An image is held out where the hash of (seed, purpose, name), as a number in [0, 1), is below `fraction`. Names in
    another Unicode form are the same name. Two exceptions, where a split would be useless: the image of each class
    whose hash is highest is kept, and where nothing would be held out, the image with the lowest hash is, of a class
    that has another one.

    Args:
        labels: int64 (N,). names: of the images, each its own.
        purpose: "validation" or "test"; each is a choice of its own.
    Raises:
        ValueError: every class has a single image.
    """
    places = np.array([_hash(f"{seed}/{purpose}/{name}") / 2**64 for name in names])
    order = np.lexsort((np.arange(len(labels)), places))
    last_of_class = np.zeros(len(labels), dtype=bool)
    last_of_class[list({int(labels[i]): i for i in order}.values())] = True
    out = (places < fraction) & ~last_of_class
    if not out.any():
        candidates = order[~last_of_class[order]]
        if len(candidates) == 0:
            raise ValueError(f"no image can be set aside for {purpose}: every class has a single image")
        out[candidates[0]] = True
    return np.flatnonzero(~out), np.flatnonzero(out)


def fewest_hashes(names: Sequence[str], count: int, seed: int, purpose: str) -> np.ndarray:
    """Positions, sorted int64, of the `count` images whose hash of (seed, purpose, name) is lowest, or of all."""
    hashes = np.array([_hash(f"{seed}/{purpose}/{name}") for name in names], dtype=np.uint64)
    return np.sort(np.argsort(hashes, kind="stable")[:count])


def evenly(labels: np.ndarray, names: Sequence[str], count: int, seed: int, purpose: str) -> np.ndarray:
    """Positions, sorted int64, of `count` images, of each class equally many as far as it has them, or of all.

    Of each class those whose hash of (seed, purpose, name) is lowest.
    """
    hashes = np.array([_hash(f"{seed}/{purpose}/{name}") for name in names], dtype=np.uint64)
    return np.sort(class_by_class(labels, hashes)[:count])


def class_by_class(labels: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Positions in such an order that the first n are equally many of each class, for any n as far as there are any.

    Args:
        labels: int64 (N,). ranks: (N,), no two alike: of a class and among classes, the lowest come first.
    """
    by_class = np.lexsort((ranks, labels))
    starts = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.empty(len(labels), dtype=np.int64)
    turn[by_class] = np.arange(len(labels)) - starts  # an image is the so many'th of its class
    return np.lexsort((ranks, turn))


def image_key(source: ImageSource, index: int) -> int:
    """A 64-bit number for image `index`: of its name, or where images have none, that index."""
    return index if source.names is None else _hash(source.names[index])


def _hash(name: str) -> int:
    """64 bits; a name in another Unicode form has the same ones."""
    text = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
