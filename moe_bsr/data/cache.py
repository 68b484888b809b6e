"""Decoded images kept in memory up to a cap, so that each is decoded once."""

import mmap
import threading

import numpy as np

from moe_bsr.data.spec import ImageSource

SLAB = 32 * 2**20


class DecodedCache:
    """Keeps the first images that fit into `megabytes` (10**6 bytes) and never evicts.

    Training walks through permutations of all images: with a cap below the data set, evicting the
    least recently used would evict each image just before its next use. Keeping the first ones
    serves cap / total of all requests.

    The pixels lie one after the other in memory of their own, outside the allocator's heap: a long-lived
    image between two steps' large tensors would pin the heap where glibc could have reused it.
    """

    def __init__(self, megabytes: float):
        self.bytes_allowed = int(megabytes * 1e6)
        self.bytes_used = 0
        self._images: dict[tuple[int, int], np.ndarray] = {}
        self._sources: dict[int, ImageSource] = {}  # held, so that an id is never used twice
        self._slab = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def image(self, source: ImageSource, index: int) -> np.ndarray:
        """Image `index` of `source`, uint8 (H, W, 3); not to be written to."""
        place = (id(source), index)
        image = self._images.get(place)
        if image is None:
            image = source.image(index)
            with self._lock:
                fits = self.bytes_used + image.nbytes <= self.bytes_allowed
                if fits and place not in self._images:
                    self._sources[id(source)] = source
                    self._images[place] = image = self._keep(image)
                    self.bytes_used += image.nbytes
        return image

    def has(self, source: ImageSource, index: int) -> bool:
        return (id(source), index) in self._images

    def _keep(self, image: np.ndarray) -> np.ndarray:
        """A copy of `image` in the slab, or in a new one when that is full."""
        if len(self._slab) < image.nbytes:
            self._slab = np.frombuffer(mmap.mmap(-1, max(SLAB, image.nbytes)), np.uint8)
        pixels, self._slab = self._slab[: image.nbytes], self._slab[image.nbytes :]
        pixels = pixels.reshape(image.shape)
        pixels[:] = image
        return pixels
