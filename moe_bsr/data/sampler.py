"""The multitask sampler: which task at which step, and which images at which visit.

Stateless: everything is a function of the seed and the step, so a resumed run needs no sampler state.
One batch is one task. Visit v of a task takes positions v*B to (v+1)*B of its concatenated per-epoch
permutations: always a full batch, nothing skipped, short datasets cycle.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from moe_bsr.config import SamplerConfig
from moe_bsr.runtime.rng import key, stream

WINDOW = 100  # updates over which proportional and temperature sampling fill their quotas


class MultitaskSampler:
    """Schedule of a whole run.

    Args:
        sizes: number of training images by task, in the order of round-robin.
        steps: optimizer updates of the run.
    """

    def __init__(self, sizes: dict[str, int], batch_size: int, steps: int, config: SamplerConfig, seed: int) -> None:
        self.sizes, self.batch_size, self.steps, self.seed = dict(sizes), batch_size, steps, seed
        self.names = list(sizes)
        if config.kind == "joint":
            visits = np.ones((steps, len(sizes)), np.int64)
        else:
            order = _order(config, list(sizes.values()), batch_size, steps, seed)
            visits = np.eye(len(sizes), dtype=np.int64)[order]
        self._visits = visits
        self._before = np.concatenate([np.zeros((1, len(sizes)), np.int64), visits.cumsum(0)])

    def tasks(self, step: int) -> list[str]:
        """The tasks of update `step` (from 0): one, or all of them when sampling jointly."""
        return [name for name, visited in zip(self.names, self._visits[step], strict=True) if visited]

    def batch(self, task: str, visit: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the task's training split and their epochs, each (B,) int64."""
        size = self.sizes[task]
        flat = np.arange(visit * self.batch_size, (visit + 1) * self.batch_size)
        epochs = flat // size
        positions = np.concatenate(
            [self._permutation(task, epoch)[flat[epochs == epoch] % size] for epoch in np.unique(epochs)]
        )
        return positions, epochs

    def batches(self, start: int = 0) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(task, positions, epochs) of every batch from update `start` on, in order."""
        for step in range(start, self.steps):
            for task in self.tasks(step):
                yield task, *self.batch(task, int(self._before[step, self.names.index(task)]))

    def progress(self, step: int) -> dict[str, dict[str, float]]:
        """Updates, images and epochs of each task in the first `step` updates."""
        counts = {}
        for name, updates in zip(self.names, self._before[step].tolist(), strict=True):
            images = updates * self.batch_size
            counts[name] = {"updates": updates, "images": images, "epochs": images / self.sizes[name]}
        return counts

    @lru_cache(maxsize=64)  # noqa: B019  (one sampler lives as long as the run)
    def _permutation(self, task: str, epoch: int) -> np.ndarray:
        return stream(key(self.seed, task, "order"), int(epoch)).permutation(self.sizes[task])


def _order(config: SamplerConfig, sizes: list[int], batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Index of the task of each update, (steps,)."""
    if config.kind == "round_robin":
        return np.arange(steps) % len(sizes)
    if config.kind == "exhaust":
        return _exhausting_round_robin([-(-size // batch_size) for size in sizes], steps)
    temperature = 1.0 if config.kind == "proportional" else config.temperature
    # In logarithms: sizes^(1/T) overflows at small T.
    scaled = np.log(sizes) / temperature
    rates = np.exp(scaled - scaled.max())
    return _by_quota(rates / rates.sum(), steps, seed)


def _by_quota(rates: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Each window holds its share of every task (largest remainder, carried on), shuffled by the seed."""
    order, given = [], np.zeros(len(rates), np.int64)
    for window, start in enumerate(range(0, steps, WINDOW)):
        end = min(start + WINDOW, steps)
        due = rates * end - given
        quota = np.maximum(np.floor(due), 0).astype(np.int64)
        missing = (end - start) - quota.sum()
        quota[np.argsort(quota - due, kind="stable")[:missing]] += 1
        given += quota
        order.append(stream(key(seed, "windows"), window).permutation(np.repeat(np.arange(len(rates)), quota)))
    return np.concatenate(order)


def _exhausting_round_robin(batches: list[int], steps: int) -> np.ndarray:
    """Round-robin in which exhausted loaders are skipped until the longest ends (the paper's order)."""
    epoch = [task for turn in range(max(batches)) for task, n in enumerate(batches) if turn < n]
    return np.resize(np.array(epoch), steps)
