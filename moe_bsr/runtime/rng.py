"""Random streams by name: the same name always gives the same numbers.

A stream depends only on its name, not on how many numbers were drawn elsewhere. So the order of work, the number of
workers and a resume do not change what is drawn.
"""

import hashlib

import numpy as np
import torch


def key(*name: str | int) -> int:
    """Return a 128-bit key for a name such as `(seed, task, "augment")`."""
    text = "/".join(str(part) for part in name)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def stream(key: int, *counter: int) -> np.random.Generator:
    """Return the stream of `key` at up to two non-negative counters, such as epoch and image index.

    Philox is counter-based, so any position is reached directly (about 14 us).
    """
    first, second = (*counter, 0, 0)[:2]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, first, second]))


def generator(*name: str | int) -> torch.Generator:
    """Return a torch generator for a name. It is on the CPU, so its numbers do not depend on the device."""
    return torch.Generator().manual_seed(key(*name) & (2**63 - 1))
