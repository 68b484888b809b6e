"""Turn decoded images into a batch: crop, resize, flip and augment each image, then normalize the whole batch."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image

from moe_bsr.config import is_crop_range, require
from moe_bsr.data.augment import Augment
from moe_bsr.data.cache import DecodedCache
from moe_bsr.data.image_files import UnreadableImage, rgb_pixels
from moe_bsr.data.resize import resized, resized_part
from moe_bsr.data.splits import SPLITS, image_key
from moe_bsr.data.task import Split, TaskData
from moe_bsr.runtime.rng import key, stream

GONE = -1  # value in `Split.index` of an image that no longer exists
ATTEMPTS = 10  # proposals for a crop, as in torchvision's RandomResizedCrop
SMALL_IMAGE_SIDE = 64  # square images up to this size are not cropped for evaluation


@dataclass(kw_only=True)
class ImageTransforms:
    """The image transforms of a run, and its cache of decoded images, which all tasks share.

    `train_transform`, `eval_transform` and `normalize` depend only on their arguments and these fields.
    `train_batch` and `eval_batches` read images through the cache.

    Attributes:
        size: side S of the square images, in pixels.
        mean, std: of each channel, for values from 0 to 1. They, `interpolation`, `crop_pct` and `crop_mode` come from
            timm's data config of the backbone.
        crop_mode: what evaluation resizes to floor(size / crop_pct) pixels before it crops the center. "center": the
            short side; "squash": both sides, without keeping the aspect ratio; "border": the long side, and the rest is
            filled with `mean`.
        resize: "timm": as `crop_mode` says; "squash": directly to the square, without a crop.
        augment: False uses the evaluation transform for training images.
        views: number of augmented views of each training image, which repeat in turn; None: a new one in each epoch.
        crop_scale, flip: replace the values of the task files; None keeps these.
        auto_augment, color_jitter, erasing: see `Augment`; applied after crop and flip.
        seed: seed of the augmentation.
        cache_mb: limit of the decoded images in memory, in 10**6 bytes.
        unreadable: "stop": an unreadable image raises UnreadableImage. "skip": in training the next readable image of
            the split replaces it, and evaluation leaves it out. A warning names it once.
        remedy: how the user can skip unreadable images, for the error of "stop".
        skipped: the unreadable images so far, by task and split: name -> reason.
    Raises:
        ValueError: a value is invalid. The message names the field.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    crop_mode: str = "center"
    resize: str = "timm"
    augment: bool = True
    views: int | None = None
    crop_scale: Sequence[float] | None = None
    flip: bool | None = None
    auto_augment: str | None = None
    color_jitter: float | None = None
    erasing: float = 0.0
    seed: int = 0
    cache_mb: float = 1000
    unreadable: str = "stop"
    remedy: str = "continue with data.unreadable=skip and resume=True"
    skipped: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation: {self.interpolation!r} is not bicubic or bilinear")
        for name, allowed in (
            ("resize", ("timm", "squash")),
            ("crop_mode", ("center", "squash", "border")),
            ("unreadable", ("stop", "skip")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not {' or '.join(allowed)}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct: {self.crop_pct} is not above 0 and at most 1")
        require(
            self.crop_scale is None or is_crop_range(self.crop_scale),
            "crop_scale",
            self.crop_scale,
            "[low, high], 0 < low <= high <= 1",
        )
        self._augment = None
        if self.augment and (self.auto_augment or self.color_jitter or self.erasing):
            about = (self.size, self.mean, self.std, self.interpolation)
            self._augment = Augment(*about, self.auto_augment, self.color_jitter, self.erasing)
        self._cache = DecodedCache(self.cache_mb)
        self._warned: set[tuple[str, str, str]] = set()
        self._unreadable: dict[tuple[str, str], set[int]] = {}  # (task, split) -> indices in the source

    def train_batch(
        self, data: TaskData, positions: np.ndarray, epochs: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return augmented training images, uint8 (B, 3, S, S), and their labels, int64 (B,).

        The augmentation depends only on the seed, the task, the epoch and the image's name (or its index in the source
        if it has none).

        Args:
            positions: (B,), positions in `data.train`.
            epochs: (B,), the epoch of each image; it selects the augmented view.
        """
        scale = self.crop_scale or data.spec.crop_scale
        flip = data.spec.flip if self.flip is None else self.flip
        stream_key = key(self.seed, data.name, "augment")
        pixels = self._empty(len(positions))
        for row, position, view in zip(pixels, positions, self.views_of(epochs), strict=True):
            position, image = self._readable(data, int(position))
            if self.augment:
                image_stream = image_key(data.train.source, data.train.place(position))
                uniforms = stream(stream_key, int(view), image_stream).random(2 * ATTEMPTS + 3)
                row[:] = self.train_transform(image, scale, flip, uniforms)
                if self._augment is not None:
                    policy_key = key(self.seed, data.name, "policy")
                    row[:] = self._augment(row, stream(policy_key, int(view), image_stream))
            else:
                row[:] = self.eval_transform(image)
        return _as_images(pixels), torch.from_numpy(data.train.labels[self.taken(data, positions)])

    def views_of(self, epochs: np.ndarray) -> np.ndarray:
        """Return the augmented view that each epoch (B,) shows, int64 (B,): epoch % `views`, or 0 without `augment`."""
        if not self.augment:
            return np.zeros_like(epochs)
        return epochs if self.views is None else epochs % self.views

    def taken(self, data: TaskData, positions: np.ndarray) -> np.ndarray:
        """Return the positions in `data.train` of the images that are used for `positions` (B,).

        An image known to be unreadable is replaced by the one at the next readable position. Others stay.
        """
        if self.unreadable == "stop":
            return positions
        taken, split = np.array(positions), data.train
        self.check(data, "train", split.gone)  # warns, the first time
        lost = [GONE, *self._unreadable.get((data.name, "train"), ())]
        for _ in range(len(split)):
            if not (unreadable := np.isin(split.index[taken], lost)).any():
                return taken
            for position in taken[split.index[taken] == GONE]:
                self._image(data, "train", int(position))  # warns, the first time
            taken[unreadable] = (taken[unreadable] + 1) % len(split)
        return positions

    def eval_batches(
        self, data: TaskData, split_name: str, batch_size: int, batches: range | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield all images of split "train", "val" or "test", in order: uint8 (B, 3, S, S) and labels int64 (B,).

        Unreadable images are left out if `unreadable` is "skip".

        Args:
            batches: numbers of the batches to yield; None for all.
        """
        if split_name not in SPLITS:
            raise ValueError(f"split: {split_name!r} is not train, val or test")
        split: Split = getattr(data, split_name)
        parts = [
            range(number * batch_size, min((number + 1) * batch_size, len(split)))
            for number in (range(-(-len(split) // batch_size)) if batches is None else batches)
        ]
        for part, following in zip_longest(parts, parts[1:], fillvalue=range(0)):
            self.expect(split, [*part, *following])
            pixels = self._empty(len(part))
            labels: list[int] = []
            for position in part:
                if (image := self._image(data, split_name, position)) is not None:
                    pixels[len(labels)] = self.eval_transform(image)
                    labels.append(split.labels[position])
            if labels:
                yield _as_images(pixels[: len(labels)]), torch.from_numpy(np.array(labels))

    def check(self, data: TaskData, split_name: str, positions: Iterable[int]) -> None:
        """Read the images at these positions of a split, to find early which cannot be read.

        Raises:
            UnreadableImage: one cannot be read, and `unreadable` is "stop".
        """
        for position in positions:
            self._image(data, split_name, position)

    def expect(self, split: Split, positions: Sequence[int] | np.ndarray) -> None:
        """Announce that the images at these positions of a split are needed soon."""
        places = split.index[np.asarray(positions, dtype=np.int64)].tolist()
        split.expect([i for i in places if not self._cache.has(split.source, i)])

    def readable(self, data: TaskData, split_name: str) -> np.ndarray:
        """Return the positions of a split whose images `eval_batches` yields, as far as unreadable ones are known."""
        split: Split = getattr(data, split_name)
        lost = [GONE, *self._unreadable.get((data.name, split_name), ())]
        return np.flatnonzero(~np.isin(split.index, lost))

    def _image(self, data: TaskData, split_name: str, position: int) -> np.ndarray | None:
        """Return the decoded image at a position of a split; None if it is skipped."""
        split: Split = getattr(data, split_name)
        index = int(split.index[position])
        unreadable = self._unreadable.setdefault((data.name, split_name), set())
        if index in unreadable:
            return None
        names, skipped = split.source.names, self.skipped.get(data.name, {}).get(split_name, {})
        name = str(index) if names is None else names[index]
        if index == GONE:
            name = split.gone.get(position, f"image {position}")
        try:
            image = self._cache.image(split.source, split.place(position))
        except UnreadableImage as error:
            self.skipped.setdefault(data.name, {}).setdefault(split_name, {})[name] = str(error)
            if self.unreadable == "stop":
                raise UnreadableImage(f"{error}; put a readable copy in its place, or {self.remedy}") from error
            if index != GONE:
                unreadable.add(index)
            if (place := (data.name, split_name, name)) not in self._warned:
                self._warned.add(place)
                warnings.warn(f"task {data.name}, {split_name}: {error}; it is skipped", stacklevel=3)
            return None
        skipped.pop(name, None)  # a readable copy has been put in its place
        return image

    def _readable(self, data: TaskData, position: int) -> tuple[int, np.ndarray]:
        """Return the first position from `position` on whose training image can be read, and the image."""
        for step in range(len(data.train)):
            place = (position + step) % len(data.train)
            if (image := self._image(data, "train", place)) is not None:
                return place, image
        raise UnreadableImage(f"task {data.name}: not one of its {len(data.train)} training images can be read")

    def eval_image(self, image: Image.Image, bits: int | None = None) -> torch.Tensor:
        """Apply the evaluation transform to a PIL image of any mode: uint8 (3, S, S).

        Args:
            bits: bit depth of the values in 16-bit images, see `TaskSpec.bits`.
        """
        pixels = self._empty(1)
        pixels[0] = self.eval_transform(rgb_pixels(image, bits))
        return _as_images(pixels)[0]

    def train_transform(
        self, image: np.ndarray, scale: Sequence[float], flip: bool, uniforms: np.ndarray
    ) -> np.ndarray:
        """Crop uint8 (H, W, 3) at random and resize the crop to (S, S, 3). With `flip`, half of the crops are mirrored.

        Args:
            scale: smallest and largest share of the image's area that a crop covers.
            uniforms: 23 numbers in [0, 1), the only randomness: 22 for `crop_box`, the last one for mirroring.
        """
        full_height, full_width = image.shape[:2]
        top, left, height, width = crop_box(full_height, full_width, scale, uniforms)
        crop = resized(image[top : top + height, left : left + width], self.size, self.size, self.interpolation)
        return crop[:, ::-1] if flip and uniforms[-1] < 0.5 else crop

    def eval_transform(self, image: np.ndarray) -> np.ndarray:
        """Resize and crop uint8 (H, W, 3) to uint8 (S, S, 3), as `resize` and `crop_mode` say."""
        height, width = image.shape[:2]
        if self.resize == "squash" or height == width <= SMALL_IMAGE_SIDE:
            return resized(image, self.size, self.size, self.interpolation)
        side = math.floor(self.size / self.crop_pct)
        if self.crop_mode == "border":
            return self._with_border(image, side)
        if self.crop_mode == "squash":
            height = width = side
        elif height <= width:
            height, width = side, int(side * width / height)
        else:
            height, width = int(side * height / width), side
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return resized_part(image, height, width, self.interpolation, top, left, self.size, self.size)

    def _with_border(self, image: np.ndarray, side: int) -> np.ndarray:
        """Resize the long side to `side` pixels, put the image on a square of the mean color, and crop to (S, S, 3)."""
        scale = max(image.shape[:2]) / side
        height, width = (max(round(length / scale), 1) for length in image.shape[:2])
        image = resized(image, height, width, self.interpolation)
        square = np.empty((max(height, self.size), max(width, self.size), 3), np.uint8)
        square[:] = [round(255 * value) for value in self.mean]
        top, left = (square.shape[0] - height) // 2, (square.shape[1] - width) // 2
        square[top : top + height, left : left + width] = image
        top, left = (round((length - self.size) / 2) for length in square.shape[:2])
        return square[top : top + self.size, left : left + self.size]

    def normalize(self, images: torch.Tensor, *, device: torch.device | str | None = None) -> torch.Tensor:
        """Normalize uint8 (B, 3, S, S) to float32 (B, 3, S, S) on `device`. Bytes are moved there, not floats."""
        images = images.to(device=device)
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1) * 255
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1) * 255
        return images.to(torch.float32).sub_(mean).div_(std)

    def _empty(self, count: int) -> np.ndarray:
        """Allocate uint8 (count, S, S, 3), channels first in memory, as torch returns resized images."""
        return np.empty((count, 3, self.size, self.size), dtype=np.uint8).transpose(0, 2, 3, 1)


def crop_box(height: int, width: int, scale: Sequence[float], uniforms: np.ndarray) -> tuple[int, int, int, int]:
    """Choose a random crop (top, left, height, width) as torchvision's RandomResizedCrop does.

    The area is uniform in `scale` times the image's area, the aspect ratio log-uniform in 3/4 to 4/3. The first of 10
    proposals that fits is taken, else the largest central crop of an allowed aspect ratio.

    Args:
        uniforms: at least 22 numbers in [0, 1), the only randomness.
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


def _as_images(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
