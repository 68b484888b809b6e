"""Assume how many tokens (rows) each expert receives, which depends on values that a trace does not have.

The largest group is set by an assumed or measured share. The other experts get equal groups.
"""

import itertools
from collections.abc import Callable


def largest_share(width: int, experts: int, k: int) -> float:
    """Estimate the size of the largest expert's group relative to an equal split, for untrained routers.

    The spread of the router logits grows with sqrt(width), and so does this ratio. Measured with random weights: 1.3,
    1.5 and 1.9 for DeiT-Ti, DeiT-S and ViT-B.
    """
    return min(1 + 0.03 * width**0.5, experts / k)


def unequal_rows(share: float) -> Callable[[int, int, int], list[int]]:
    """Return a function (assignments, experts, multiple) -> padded rows of each expert.

    The first expert has the largest group, the others have about equal ones. Kernels pad each group to a multiple.
    The equal groups are therefore spread over the width of one multiple, so that the padding is that of an average
    batch.

    Args:
        share: size of the largest group relative to an equal split.
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
