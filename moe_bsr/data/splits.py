"""Choose which images of a source are held out for validation and test, by a hash of each image's own name.

An image that is added, removed or renamed does not move another one between training, validation and test, apart from
the two exceptions in `held_out`. So a folder that grows keeps its splits, and a model is not tested on images that it
was trained on. In return, the size of a split, in a class and as a whole, equals the requested share only on average.
"""

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from moe_bsr.data.spec import ImageSource

SPLITS = ("train", "val", "test")


def held_out(
    labels: np.ndarray, names: Sequence[str], fraction: float, seed: int, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Split positions 0..N-1 into those kept and those held out, both sorted int64. Depends on the arguments only.

    An image is held out if the hash of (seed, purpose, name), as a number in [0, 1), is below `fraction`. The Unicode
    form of a name does not matter. Two exceptions keep both parts useful. In each class the image with the highest hash
    is kept. If nothing would be held out, the image with the lowest hash is, among classes with more than one image.

    Args:
        labels: int64 (N,).
        names: names of the images, all different.
        purpose: "validation" or "test"; the two choices are independent.
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
    """Return the positions, sorted int64, of the `count` images with the lowest hash of (seed, purpose, name)."""
    hashes = np.array([_hash(f"{seed}/{purpose}/{name}") for name in names], dtype=np.uint64)
    return np.sort(np.argsort(hashes, kind="stable")[:count])


def evenly(labels: np.ndarray, names: Sequence[str], count: int, seed: int, purpose: str) -> np.ndarray:
    """Return the positions, sorted int64, of `count` images, equally many of each class as far as it has them.

    In each class the images with the lowest hash of (seed, purpose, name) are chosen.
    """
    hashes = np.array([_hash(f"{seed}/{purpose}/{name}") for name in names], dtype=np.uint64)
    return np.sort(class_by_class(labels, hashes)[:count])


def class_by_class(labels: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Order positions so that, for every n, the first n hold equally many images of each class, as far as it has them.

    Args:
        labels: int64 (N,).
        ranks: (N,), all different. Images of lower rank come first, within a class and among classes.
    """
    by_class = np.lexsort((ranks, labels))
    starts = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.empty(len(labels), dtype=np.int64)
    turn[by_class] = np.arange(len(labels)) - starts  # how many images of its class come before
    return np.lexsort((ranks, turn))


def image_key(source: ImageSource, index: int) -> int:
    """Return a 64-bit number that identifies image `index`: the hash of its name, or `index` if it has no name."""
    return index if source.names is None else _hash(source.names[index])


def _hash(name: str) -> int:
    """Hash a name to 64 bits. All Unicode forms of a name have the same hash."""
    text = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
