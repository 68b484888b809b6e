"""Cache of decoded images in memory, up to a limit."""

import mmap
import threading

import numpy as np

from moe_bsr.data.spec import ImageSource

SLAB = 32 * 2**20  # bytes allocated at a time


class DecodedCache:
    """Cache that keeps the first images that fit into `megabytes` (10**6 bytes) and never evicts one.

    Training visits all images in a new order each epoch. If they do not all fit, a least-recently-used cache would
    mostly evict images shortly before their next use. Keeping the first ones serves (limit / total size) of all
    requests.

    The pixels are stored in slabs from mmap and not on the heap. On the heap, long-lived images would lie between the
    large tensors of training steps, and glibc could not reuse that memory as a whole.
    """

    def __init__(self, megabytes: float):
        self.bytes_allowed = int(megabytes * 1e6)
        self.bytes_used = 0
        self._images: dict[tuple[int, int], np.ndarray] = {}
        self._sources: dict[int, ImageSource] = {}  # references to the sources, so that no id is reused
        self._slab = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def image(self, source: ImageSource, index: int) -> np.ndarray:
        """Return image `index` of `source`, uint8 (H, W, 3), from the cache or decoded now. It must not be modified."""
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
        """Copy `image` to the slab, or to a new slab if it does not fit, and return the copy."""
        if len(self._slab) < image.nbytes:
            self._slab = np.frombuffer(mmap.mmap(-1, max(SLAB, image.nbytes)), np.uint8)
        pixels, self._slab = self._slab[: image.nbytes], self._slab[image.nbytes :]
        pixels = pixels.reshape(image.shape)
        pixels[:] = image
        return pixels
