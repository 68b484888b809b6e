"""What of the memory a run may use: how its backward pass is stored, in how many micro-batches, with which caches."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.config.schema import AUGMENT_KEYS, DataConfig
from moe_bsr.cost.predict import predict
from moe_bsr.model.multitask import build_on_meta

STORAGES = ("exact", "int8", "recompute", "recompute_int8")  # from the fastest to the leanest
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
LEAST_IMAGE_CACHE = 16  # MB
# Beside the libraries of a process that has not trained yet, a run has those that load on first use, checkpoints, and
# freed memory that the heap keeps: 47 and 69 MB were measured in two runs.
SPARE = 70 * 2**20
PLAIN = {key: DataConfig.__dataclass_fields__[key].default for key in (*AUGMENT_KEYS, "views")}


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of this process, in bytes.

    Attributes:
        limit: that it may take. base: what it takes without a model: libraries and data, and on a CPU `SPARE`.
        evaluation: most that an evaluation takes beside the parameters.
        reason: where the limit comes from.
    """

    limit: int
    base: int
    evaluation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Fitted:
    """A configuration that fits.

    Attributes:
        bytes: predicted for the whole process at its peak, caches included. left: of the limit.
    """

    config: Config
    bytes: int
    left: int


def fitted(config: Config, classes: dict[str, int], memory: Memory, precision: str, decoded: int) -> Fitted:
    """The fastest form of a run that fits: saved exactly, else in micro-batches, else packed, else computed again.

    Args:
        classes: by task. decoded: bytes of all decoded images, which half of what is left may hold.

    Raises:
        ConfigError: none does.
    """
    least = None
    for candidate in _forms(config):
        model = build_on_meta(candidate, classes)
        micro_batch = candidate.train.batch_size // candidate.train.grad_accumulation_steps
        cost = predict(model, candidate, batch=micro_batch, precision=precision, all_tasks=True)
        needed = memory.base + max(cost.peak, cost.parameters + memory.evaluation)
        if config.data.feature_cache_dir is None:
            needed += (config.data.feature_cache_mb or 0) * 10**6
        wanted = min(config.data.image_cache_mb, ceil(decoded / 1e6))
        images = min(wanted, (memory.limit - needed) // 2 // 10**6)
        if images >= min(LEAST_IMAGE_CACHE, wanted):
            left = memory.limit - needed - images * 10**6
            return Fitted(configuration.replace(candidate, data__image_cache_mb=images), needed + images * 10**6, left)
        least = min(needed, least or needed)
    raise ConfigError(
        f"memory: {memory.limit / 2**20:.0f} MB ({memory.reason}), and this needs {ceil(least / 2**20) + 16} MB at "
        f"least, {memory.base / 2**20:.0f} of them for libraries; give more, or take a smaller backbone.name"
    )


def _forms(config: Config) -> Iterator[Config]:
    own = [config.storage] if config.storage != "exact" else []
    frozen = config.train.optimizer == "lbfgs"
    for storage in own or (STORAGES[:1] if frozen else STORAGES):
        for parts in MICRO_BATCHES[:1] if frozen else MICRO_BATCHES:
            with contextlib.suppress(ConfigError):  # a batch that is not to be split so, or not at all
                yield configuration.replace(config, storage=storage, train__grad_accumulation_steps=parts)


def with_feature_cache(config: Config, room: int, images: int, tokens: int, width: int, itemsize: int) -> Config:
    """The run with what its frozen blocks make of each image kept, unaugmented, if there is room for that.

    A run that mixes images has nothing to keep, and one with augmentation of its own would lose it.

    Args:
        room: bytes. images: for training, of all tasks. tokens, width: of the stream where the first block trains.
        itemsize: bytes of one of its values.
    """
    each = tokens * 8 + len(config.plan.head_blocks) * width * itemsize  # origins, and class tokens for the heads
    sizes = {"exact": tokens * width * itemsize + each, "int8": tokens * width + 4 * width + each}
    fits = [kind for kind, size in sizes.items() if 1.02 * images * size <= room]
    own = any(getattr(config.data, key) != default for key, default in PLAIN.items())
    if not fits or own or config.train.mixup or config.train.cutmix:
        return config
    seen = {"data__augment": False, "data__crop_scale": None, "data__hflip": None}
    megabytes = ceil(1.02 * images * sizes[fits[0]] / 1e6)
    return configuration.replace(config, data__feature_cache_mb=megabytes, data__feature_cache=fits[0], **seen)
