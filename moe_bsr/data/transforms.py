"""From decoded images to a batch: crop, resize, flip; normalization on the whole batch.

Resizing is torch's antialiased uint8 kernel: its pixels differ from Pillow's by at most 2 (mean
below 0.3), in 0.13-0.17 ms an image to 224 px on one core where Pillow takes 0.33-0.46.
torchvision's v2 functions call the same kernel and take 0.005 ms more.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from moe_bsr.config import is_crop_range, require
from moe_bsr.data.cache import DecodedCache
from moe_bsr.data.image_files import exif_rgb
from moe_bsr.data.splits import image_key
from moe_bsr.data.task import Split, TaskData
from moe_bsr.runtime.rng import key, stream

ATTEMPTS = 10  # as torchvision's RandomResizedCrop
SMALL_IMAGE_SIDE = 64  # square images up to this size are not cropped for evaluation


@dataclass(kw_only=True)
class ImageTransforms:
    """The transforms of a run, and its cache of decoded images, which all tasks share.

    `train_transform`, `eval_transform` and `normalize` depend on their arguments and these fields alone;
    `train_batch` and `eval_batches` read the images through the cache.

    Attributes:
        size: side S of the square images, in pixels.
        mean, std: of values 0 to 1; these, `interpolation` and `crop_pct` come from timm's data config of the backbone.
        resize: for evaluation. "timm": the short side to floor(size / crop_pct), then the center is cropped;
            "squash": to the square, aspect not kept.
        augment: False shows training images as evaluation sees them.
        crop_scale, flip: override the tasks' own.
        seed: of the augmentation.
        cache_mb: how much the decoded images in memory may take, in 10**6 bytes.
    Raises:
        ValueError: names the field.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    resize: str = "timm"
    augment: bool = True
    crop_scale: Sequence[float] | None = None
    flip: bool | None = None
    seed: int = 0
    cache_mb: float = 1000

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation: {self.interpolation!r} is not bicubic or bilinear")
        if self.resize not in ("timm", "squash"):
            raise ValueError(f"resize: {self.resize!r} is not timm or squash")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct: {self.crop_pct} is not above 0 and at most 1")
        require(
            self.crop_scale is None or is_crop_range(self.crop_scale),
            "crop_scale",
            self.crop_scale,
            "[low, high], 0 < low <= high <= 1",
        )
        self._cache = DecodedCache(self.cache_mb)

    def train_batch(
        self, data: TaskData, positions: np.ndarray, epochs: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augmented training images: uint8 (B, 3, S, S), and labels int64 (B,).

        `positions` (B,) index `data.train`; `epochs` (B,) tell repetitions apart. What an image
        becomes depends on (seed, task, epoch, its name) and on nothing else; images without names are known by
        their place in the source.
        """
        scale = self.crop_scale or data.spec.crop_scale
        flip = data.spec.flip if self.flip is None else self.flip
        stream_key = key(self.seed, data.name, "augment")
        pixels = self._empty(len(positions))
        for row, position, epoch in zip(pixels, positions, epochs, strict=True):
            place = data.train.place(position)
            image = self._cache.image(data.train.source, place)
            if self.augment:
                uniforms = stream(stream_key, int(epoch), image_key(data.train.source, place)).random(2 * ATTEMPTS + 3)
                row[:] = self.train_transform(image, scale, flip, uniforms)
            else:
                row[:] = self.eval_transform(image)
        return _as_images(pixels), torch.from_numpy(data.train.labels[positions])

    def eval_batches(
        self, data: TaskData, split_name: str, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All images of split "train", "val" or "test" in order, as `train_batch` gives them."""
        if split_name not in ("train", "val", "test"):
            raise ValueError(f"split: {split_name!r} is not train, val or test")
        split: Split = getattr(data, split_name)
        for start in range(0, len(split), batch_size):
            part = range(start, min(start + batch_size, len(split)))
            pixels = self._empty(len(part))
            for row, position in zip(pixels, part, strict=True):
                row[:] = self.eval_transform(self._cache.image(split.source, split.place(position)))
            yield _as_images(pixels), torch.from_numpy(split.labels[start : start + batch_size])

    def eval_image(self, image: Image.Image) -> torch.Tensor:
        """Any PIL image as evaluation would see it, uint8 (3, S, S)."""
        pixels = self._empty(1)
        pixels[0] = self.eval_transform(np.array(exif_rgb(image)))
        return _as_images(pixels)[0]

    def train_transform(
        self, image: np.ndarray, scale: Sequence[float], flip: bool, uniforms: np.ndarray
    ) -> np.ndarray:
        """A random crop of uint8 (H, W, 3), resized to (S, S, 3), half of them mirrored where `flip`.

        `uniforms`: 23 numbers in [0, 1), the only randomness (see `crop_box`; the last one decides about mirroring).
        """
        full_height, full_width = image.shape[:2]
        top, left, height, width = crop_box(full_height, full_width, scale, uniforms)
        crop = resized(image[top : top + height, left : left + width], self.size, self.size, self.interpolation)
        return crop[:, ::-1] if flip and uniforms[-1] < 0.5 else crop

    def eval_transform(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) to uint8 (S, S, 3)."""
        height, width = image.shape[:2]
        if self.resize == "squash" or height == width <= SMALL_IMAGE_SIDE:
            return resized(image, self.size, self.size, self.interpolation)
        short = math.floor(self.size / self.crop_pct)
        if height <= width:
            height, width = short, int(short * width / height)
        else:
            height, width = int(short * height / width), short
        image = resized(image, height, width, self.interpolation)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return image[top : top + self.size, left : left + self.size]

    def normalize(self, images: torch.Tensor, *, device: torch.device | str | None = None) -> torch.Tensor:
        """uint8 (B, 3, S, S) to normalized (B, 3, S, S) on `device`, computed in float32.

        The bytes travel, not the floats.
        """
        images = images.to(device=device)
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1) * 255
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1) * 255
        return images.to(torch.float32).sub_(mean).div_(std)

    def _empty(self, count: int) -> np.ndarray:
        """uint8 (count, S, S, 3), in memory one color plane after the other, as torch resizes."""
        return np.empty((count, 3, self.size, self.size), dtype=np.uint8).transpose(0, 2, 3, 1)


def crop_box(height: int, width: int, scale: Sequence[float], uniforms: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, as torchvision's RandomResizedCrop chooses it.

    Area uniform in `scale` times the image's, aspect log-uniform in 3/4 to 4/3; the first of 10
    proposals that fits, else the largest central crop of an allowed aspect. `uniforms`: at least
    22 numbers in [0, 1), the only randomness.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniforms[:ATTEMPTS])
    bound = math.log(4 / 3)
    ratio = np.exp(bound * (2 * uniforms[ATTEMPTS : 2 * ATTEMPTS] - 1))
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    if not fits.any():
        crop_h, crop_w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w
    first = int(np.argmax(fits))
    crop_h, crop_w = int(heights[first]), int(widths[first])
    down, across = uniforms[2 * ATTEMPTS : 2 * ATTEMPTS + 2]
    return int(down * (height - crop_h + 1)), int(across * (width - crop_w + 1)), crop_h, crop_w


def resized(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """uint8 (H, W, 3) resized with antialiasing; pixels outside `image` play no part."""
    if image.shape[:2] == (height, width):
        return image
    # copied, for torch wants writable memory, and alone on one thread: see loader.py
    tensor = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)[None]
    tensor = F.interpolate(tensor, (height, width), mode=interpolation, antialias=True)
    return tensor[0].permute(1, 2, 0).numpy()


def _as_images(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
