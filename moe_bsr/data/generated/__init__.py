"""Image classification tasks drawn by code: there is nothing to download, and the images are the same on every run.

A family is the drawing code of one task. Image `i` of a split is a function of (family, split, seed, i) only. It is
drawn when it is requested, in any order, and not stored. Labels are balanced, because they repeat the classes in turn.
The tasks of a suite (`suites.py`) share their images and differ in the labels.
"""

import zlib

import numpy as np

from moe_bsr.data.generated import suites
from moe_bsr.data.generated.pretraining_family import SOURCE_FAMILY
from moe_bsr.data.generated.task_families import TASK_FAMILIES

_DRAWN = {**TASK_FAMILIES, "source": SOURCE_FAMILY}
FAMILIES = tuple(_DRAWN)  # the five tasks, then the family that the bundled backbone is pretrained on


class Generated:
    """Source of `count` drawn images, uint8 (64, 64, 3) RGB, without names.

    `split` may be any name. Different names, like different seeds, have separate random streams.
    Raises ValueError for an unknown family or a count below one, IndexError for an index out of range.
    """

    names = None
    sizes = None
    _suite = None

    def __init__(self, family: str, split: str, count: int, seed: int = 0):
        if family not in _DRAWN and family not in suites.SUITE_FAMILIES:
            known = ", ".join((*FAMILIES, *suites.SUITE_FAMILIES))
            raise ValueError(f"family: {family!r} is unknown; choose one of {known}")
        if count < 1:
            raise ValueError(f"count: {count} images of {family!r}; ask for one or more")
        if family in suites.SUITE_FAMILIES:
            self._open_suite(*suites.SUITE_FAMILIES[family], split, count, seed)
            return
        names, self._draw = _DRAWN[family]
        self.class_names = list(names)
        self.labels = np.arange(count, dtype=np.int64) % len(names)
        self._stream = (zlib.crc32(f"{family}/{split}".encode()), seed)

    def _open_suite(self, suite: str, factor: str, split: str, count: int, seed: int):
        stream = (zlib.crc32(f"{suite}/{split}".encode()), seed)
        self.class_names = suites.SUITES[suite][0][factor]
        self.labels = np.array([suites.label(suite, factor, stream, i) for i in range(count)], np.int64)
        self._suite, self._stream = suite, stream

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        if self._suite is not None:
            return suites.image(self._suite, self._stream, index)
        return self._draw(int(self.labels[index]), np.random.default_rng((*self._stream, index)))
