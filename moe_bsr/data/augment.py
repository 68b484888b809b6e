"""Augmentation beyond crop and flip: RandAugment, color jitter and random erasing, with timm's code.

timm and torchvision draw from the global generators of `random`, numpy and torch. Here the image's own random stream
seeds these generators, and their states are restored afterwards. So an augmented image depends on its stream alone, and
augmentation changes no other random numbers.
"""

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train

from moe_bsr.config import require

_GLOBAL_GENERATORS = threading.Lock()  # the loader's thread and the main thread both augment


@contextlib.contextmanager
def seeded(stream: np.random.Generator) -> Iterator[None]:
    """Seed the global generators of `random`, numpy and torch (CPU) from `stream`; restore their states at the end."""
    first, second, third = stream.integers(0, 2**32, 3).tolist()
    with _GLOBAL_GENERATORS:
        before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
        random.seed(first)
        np.random.seed(second)
        torch.default_generator.manual_seed(third)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.random.set_rng_state(before[2])


class Augment:
    """Random augmentation of one image, uint8 (S, S, 3) -> uint8 (S, S, 3).

    The order is timm's: the policy, color jitter (with a policy too, as with timm's `force_color_jitter`), random
    erasing. The erased rectangle is filled with noise that has the mean and standard deviation of the inputs.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        auto_augment: str | None = None,
        color_jitter: float | None = None,
        erasing: float = 0.0,
    ) -> None:
        """
        Args:
            size: S, in pixels.
            mean, std: of each channel, for values from 0 to 1.
            auto_augment: policy in timm's notation: rand-m9-mstd0.5-inc1, augmix-m3, original, 3a, ...
            color_jitter: largest relative change of brightness, contrast and saturation.
            erasing: probability that a rectangle is erased.
        Raises:
            ConfigError: timm has no such policy.
        """
        self._scale = torch.tensor(std).view(3, 1, 1) * 255
        self._shift = torch.tensor(mean).view(3, 1, 1) * 255
        try:
            _, self._change, _ = transforms_imagenet_train(
                size,
                color_jitter=color_jitter or None,  # type: ignore[arg-type]  # None: no color jitter
                force_color_jitter=True,
                auto_augment=auto_augment,
                interpolation=interpolation,
                mean=tuple(mean),
                separate=True,
            )
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            what = "null, or a policy in timm's notation: rand-m9-mstd0.5-inc1, augmix-m3-w3, original-mstd0.5, 3a"
            require(False, "data.auto_augment", auto_augment, f"{what} ({error})" if str(error) else what)
        self._erase = RandomErasing(erasing, mode="pixel", device="cpu") if erasing else None

    def __call__(self, image: np.ndarray, stream: np.random.Generator) -> np.ndarray:
        """Return the augmented image. `stream` is the only source of randomness."""
        with seeded(stream):
            if self._change.transforms:
                image = np.asarray(self._change(Image.fromarray(np.ascontiguousarray(image))))
            if self._erase is not None:
                noise = self._erase(torch.full((3, *image.shape[:2]), torch.nan))
                erased = (noise * self._scale + self._shift).round_().clamp_(0, 255).permute(1, 2, 0).numpy()
                image = np.where(np.isnan(erased), image, np.nan_to_num(erased).astype(np.uint8))
        return image
