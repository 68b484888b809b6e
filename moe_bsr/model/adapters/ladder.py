"""Options of the ladder, a side network beside the whole backbone (`model/ladder.py`)."""

from dataclasses import dataclass

from moe_bsr.config import require
from moe_bsr.model.adapters import ADAPTERS, Adapter


@dataclass(frozen=True)
class LadderOptions:
    """Options of the ladder.

    Attributes:
        reduction: the backbone's width divided by the width of a side block.
    """

    reduction: int = 8

    def __post_init__(self) -> None:
        require(2 <= self.reduction <= 64, "adapter.reduction", self.reduction, "2 to 64, a divisor of the width")


ADAPTERS.register("ladder", LadderOptions)(Adapter(None))
