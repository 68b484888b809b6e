"""Multitask sampler: chooses the task of each update and the images of each batch.

It has no state. Everything is a function of the seed and the step, so checkpoints need not contain a sampler state.
A batch holds images of one task. The v-th batch of a task (its visit v) takes positions v*B to (v+1)*B of the task's
concatenated permutations, one for each epoch. So every batch is full, no image is left out, and small datasets repeat.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moe_bsr.config import SamplerConfig
from moe_bsr.config.registry import Registry
from moe_bsr.runtime.rng import key, stream

WINDOW = 100  # updates over which proportional and temperature sampling fill their quotas
COUNTED = 1000  # visits before every COUNTED-th update are stored; those in between are counted from there


@dataclass(frozen=True, slots=True)
class Request:
    """Input of a sampler. `sizes` are the numbers of training images of the tasks, in the order of round-robin."""

    sizes: list[int]
    batch_size: int
    steps: int
    seed: int
    config: SamplerConfig


# A sampler is a function Request -> (steps, K): the indices of the K tasks that each update visits, in rising order.
SAMPLERS: Registry[Callable[[Request], np.ndarray]] = Registry("sampler.kind")


class MultitaskSampler:
    """Schedule of a whole run.

    Args:
        sizes: number of training images by task, in the order of round-robin.
        steps: optimizer updates of the run.
        earlier: pairs (step, steps) of a run whose length was changed: up to update `step` it was planned with `steps`
            updates. The order up to there is kept, as orders that fill quotas depend on the number of updates.
        labels: int64 (images,) by task; needed for `sampler.classes: balanced` only.
    Raises:
        ConfigError: `sampler.kind` is not one of `SAMPLERS`.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        batch_size: int,
        steps: int,
        config: SamplerConfig,
        seed: int,
        earlier: Sequence[tuple[int, int]] = (),
        labels: dict[str, np.ndarray] | None = None,
    ) -> None:
        schedule = SAMPLERS[SAMPLERS.choose(config.kind).kind]
        self.sizes, self.batch_size, self.steps, self.seed = dict(sizes), batch_size, steps, seed
        self.names = list(sizes)
        self._balances = config.classes == "balanced"
        self._by_class = {
            task: [np.flatnonzero(of == label) for label in np.unique(of)]
            for task, of in (labels or {}).items()
            if self._balances
        }
        parts, start = [], 0
        for end, planned in (*earlier, (steps, steps)):
            parts.append(schedule(Request(list(sizes.values()), batch_size, planned, seed, config))[start:end])
            start = end
        self._order = np.concatenate(parts).astype(np.int32, copy=False)
        blocks = [self._order[at : at + COUNTED].ravel() for at in range(0, steps, COUNTED)]
        counts = [np.bincount(block, minlength=len(sizes)) for block in blocks]
        self._counts = np.cumsum(
            [np.zeros(len(sizes), np.int64), *counts], 0
        )  # row n: visits before update n * COUNTED

    def tasks(self, step: int) -> list[str]:
        """Return the tasks of update `step` (from 0): one task, or all of them with `sampler.kind: joint`."""
        return [self.names[place] for place in self._order[step]]

    def batch(self, task: str, visit: int) -> tuple[np.ndarray, np.ndarray]:
        """Return positions in the task's training split, and their epochs, each int64 (B,).

        With balanced classes, an image's epoch is how often it was drawn before. It rises faster for small classes.
        """
        size = self.sizes[task]
        flat = np.arange(visit * self.batch_size, (visit + 1) * self.batch_size)
        epochs = flat // size
        if self._balances:
            drawn = [self._balanced(task, epoch)[:, flat[epochs == epoch] % size] for epoch in np.unique(epochs)]
            positions, times = np.concatenate(drawn, 1)
            return positions, times
        positions = np.concatenate(
            [self._permutation(task, epoch)[flat[epochs == epoch] % size] for epoch in np.unique(epochs)]
        )
        return positions, epochs

    def batches(self, start: int = 0) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield (task, positions, epochs) of every batch from update `start` on, in order."""
        visits = self._visits(start)
        for step in range(start, self.steps):
            for place in self._order[step]:
                yield self.names[place], *self.batch(self.names[place], int(visits[place]))
                visits[place] += 1

    def progress(self, step: int) -> dict[str, dict[str, float]]:
        """Return the updates, images and epochs of each task in the first `step` updates."""
        counts = {}
        for name, updates in zip(self.names, self._visits(step).tolist(), strict=True):
            images = updates * self.batch_size
            counts[name] = {"updates": updates, "images": images, "epochs": images / self.sizes[name]}
        return counts

    def _visits(self, step: int) -> np.ndarray:
        """Count the batches of each task in the first `step` updates: int64 (tasks,)."""
        block = step // COUNTED
        rest = self._order[block * COUNTED : step].ravel()
        return self._counts[block] + np.bincount(rest, minlength=len(self.names))

    @lru_cache(maxsize=64)  # noqa: B019  (one sampler lives as long as the run)
    def _permutation(self, task: str, epoch: int) -> np.ndarray:
        return stream(key(self.seed, task, "order"), int(epoch)).permutation(self.sizes[task])

    @lru_cache(maxsize=64)  # noqa: B019
    def _balanced(self, task: str, epoch: int) -> np.ndarray:
        """Draw as many images as the task has, equally many of each class.

        The draws of all epochs are numbered, and the classes take turns: so their numbers of draws never differ by more
        than one. Each class goes through its images in a new order every time.

        Returns:
            int64 (2, images): the position of each draw, and how often that image was drawn before.
        """
        classes, size = self._by_class[task], self.sizes[task]
        order, count = key(self.seed, task, "balanced order"), len(classes)
        # Draws of class c before epoch e: those of the first e * size turns, which go around the classes.
        before, after = ((turns * size - np.arange(count) + count - 1) // count for turns in (epoch, epoch + 1))
        drawn = []
        for label, places in enumerate(classes):
            draws = np.arange(before[label], after[label])
            times = draws // len(places)
            passes = [places[self._pass(task, label, n)][draws[times == n] % len(places)] for n in np.unique(times)]
            drawn.append(np.stack([np.concatenate(passes), times]))
        return np.concatenate(drawn, 1)[:, stream(order, int(epoch)).permutation(size)]

    def _pass(self, task: str, label: int, number: int) -> np.ndarray:
        name = key(self.seed, task, "balanced class", label)
        return stream(name, int(number)).permutation(len(self._by_class[task][label]))


@SAMPLERS.register("joint")
def joint(request: Request) -> np.ndarray:
    """Every task in every update."""
    return np.broadcast_to(np.arange(len(request.sizes)), (request.steps, len(request.sizes)))


@SAMPLERS.register("round_robin")
def round_robin(request: Request) -> np.ndarray:
    """The tasks take turns."""
    return _one(np.arange(request.steps) % len(request.sizes))


@SAMPLERS.register("proportional")
def proportional(request: Request) -> np.ndarray:
    """Each task in proportion to its number of images."""
    return _by_temperature(request, 1.0)


@SAMPLERS.register("temperature")
def temperature(request: Request) -> np.ndarray:
    """Each task in proportion to (number of images)^(1 / sampler.temperature)."""
    return _by_temperature(request, request.config.temperature)


@SAMPLERS.register("exhaust")
def exhaust(request: Request) -> np.ndarray:
    """Round-robin that skips tasks whose epoch has ended until the largest task's epoch ends (the paper's order)."""
    batches = [-(-size // request.batch_size) for size in request.sizes]
    epoch = [task for turn in range(max(batches)) for task, n in enumerate(batches) if turn < n]
    return _one(np.resize(np.array(epoch), request.steps))


def _one(order: np.ndarray) -> np.ndarray:
    """Convert the task index of each update, (steps,), to the result of a sampler, int32 (steps, 1)."""
    return order.astype(np.int32)[:, None]


def _by_temperature(request: Request, temperature: float) -> np.ndarray:
    # In logarithms: sizes^(1/T) overflows at small T.
    scaled = np.log(request.sizes) / temperature
    rates = np.exp(scaled - scaled.max())
    return _one(_by_quota(rates / rates.sum(), request.steps, request.seed))


def _by_quota(rates: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Return the task index of each update, (steps,).

    Each window of `WINDOW` updates contains every task in proportion to its rate (by largest remainder, which carries
    over to the next window), in an order shuffled by the seed.
    """
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
