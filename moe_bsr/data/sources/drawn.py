"""Source "generated": images drawn by the code in `moe_bsr/data/generated/`, with nothing to download."""

from dataclasses import dataclass, field
from pathlib import Path

from moe_bsr.config import require
from moe_bsr.data.spec import SOURCES, TaskImages, TaskSpec


@SOURCES.register("generated")
@dataclass(frozen=True, kw_only=True)
class GeneratedTask(TaskSpec):
    """A family of drawn images.

    Attributes:
        family: one of `FAMILIES` or of the suites' families.
        train: number of images for training and validation together.
        test: number of test images.
        seed: seed of the drawing.
    """

    family: str
    classes: int = field()
    train: int
    test: int
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("train", "test"):
            require(2 <= getattr(self, key) <= 10**6, key, getattr(self, key), "at least 2 images, at most 1,000,000")
        require(self.seed >= 0, "seed", self.seed, "at least 0")

    def open(self, root: Path, download: bool = False) -> TaskImages:
        from moe_bsr.data.generated import Generated  # imported here, as no other source needs it

        train = Generated(self.family, "train", self.train, self.seed)
        test = Generated(self.family, "test", self.test, self.seed)
        return TaskImages(train=train, test=test, origin=f"drawn: {self.family}, seed {self.seed}")
