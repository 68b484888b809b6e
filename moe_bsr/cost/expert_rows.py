"""How many rows each expert gets, which values decide: a stated largest share, the others alike."""

import itertools
from collections.abc import Callable


def largest_share(width: int, experts: int, k: int) -> float:
    """The largest expert's group over an equal one, as fresh routers make it: the spread of their logits, and
    with it this, grows with sqrt(width). Measured with random weights: 1.3, 1.5, 1.9 for DeiT-Ti, DeiT-S, ViT-B."""
    return min(1 + 0.03 * width**0.5, experts / k)


def unequal_rows(share: float) -> Callable[[int, int, int], list[int]]:
    """Rows of each expert where values are not known: the first has the largest share, the others equal ones.

    Rows are padded to a multiple. The others' are spread over one multiple, so that as much is padding as is on
    average.

    Args:
        share: the largest group over an equal one.
    """

    def rows(assignments: int, experts: int, multiple: int) -> list[int]:
        others = experts - 1
        largest = min(round(share * assignments / experts), assignments) if others else assignments
        each = (assignments - largest) / max(others, 1)
        spread = min(multiple, 2 * each) if multiple > 1 else 0
        sums = [round(each * n + spread * (n * n / max(others, 1) - n) / 2) for n in range(experts)]
        counts = [largest, *(b - a for a, b in itertools.pairwise(sums))]
        return [-(-count // multiple) * multiple for count in counts]

    return rows
