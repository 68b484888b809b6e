"""Random streams by name: the same words always give the same numbers.

A stream depends on its name alone, never on how many numbers were drawn elsewhere; so the order of
work, the number of workers and a resume cannot change what is drawn.
"""

import hashlib

import numpy as np
import torch


def key(*name: str | int) -> int:
    """A 128-bit key for a name such as `(seed, task, "augment")`."""
    text = "/".join(str(part) for part in name)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def stream(key: int, *counter: int) -> np.random.Generator:
    """The stream of `key` at up to two counters (non-negative), e.g. epoch and image index.

    Philox is counter-based: any position of any stream is reached at once (about 14 us).
    """
    first, second = (*counter, 0, 0)[:2]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, first, second]))


def generator(*name: str | int) -> torch.Generator:
    """A torch generator (on the CPU) for a name: its numbers are the same whatever the device."""
    return torch.Generator().manual_seed(key(*name) & (2**63 - 1))
