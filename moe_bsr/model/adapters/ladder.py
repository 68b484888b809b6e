"""The adapter that is a side network beside the whole backbone: its options (`model/ladder.py` has the network)."""

from dataclasses import dataclass

from moe_bsr.config import require
from moe_bsr.model.adapters import ADAPTERS, Adapter


@dataclass(frozen=True)
class LadderOptions:
    """reduction: the width of a side block is the backbone's over this."""

    reduction: int = 8

    def __post_init__(self) -> None:
        require(2 <= self.reduction <= 64, "adapter.reduction", self.reduction, "2 to 64, a divisor of the width")


ADAPTERS.register("ladder", LadderOptions)(Adapter(None))
