"""Cache of the features that the frozen blocks before the gradient path compute for all training images.

Without augmentation an image is the same in every epoch, and with `data.views` it comes in a fixed number of augmented
views. So its features repeat as well. Once a view is cached, the image is not decoded and these blocks do not run
again.
"""

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator
from math import ceil, prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_bsr.config import Config, ConfigError, DataConfig, require
from moe_bsr.data import ImageTransforms, Loader, TaskData
from moe_bsr.data.loader import Batch
from moe_bsr.model.block import Record
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.tokens import Dropped, Rung, Tokens
from moe_bsr.runtime.device import Runtime
from moe_bsr.training.inputs import Inputs

Features = tuple[Tokens, dict[int, Record]]
TINY = 1e-30  # the scale of a channel of zeros


class FeatureCache:
    """Outputs of the frozen blocks before block `start` for each view of each training image of each task.

    Successive runs with the same frozen blocks and images can share one cache (`api.train`). The cache does not keep
    their models alive.

    Attributes:
        start: index of the first block that is not run.
        bytes: size of the cache with all views.
        views: number of views of each image.
    """

    def __init__(self, model: MultitaskViT, sizes: dict[str, int], settings: DataConfig) -> None:
        """
        Args:
            model: already on its device; call under the autocast context of training. sizes: training images by task.
            settings: uses feature_cache_mb (limit in 10**6 bytes), feature_cache, feature_cache_dir and views.
        Raises:
            ConfigError: the limit is too small for all views, the embedding trains, or the folder does not exist.
        """
        megabytes = settings.feature_cache_mb
        require(
            not model.embedding_trains,
            "data.feature_cache_mb",
            megabytes,
            "null (off): the embedding trains under this plan, so no features stay the same",
        )
        self.views = (settings.views or 1) if settings.augment else 1
        self.images: dict[str, str] = {}  # digests of the training images by task, set by the first run
        self.start, self.key = model.path_start, model.features_key()
        self._only = model if self.key == (id(model),) else None  # as long as it exists, no other model has its id
        self._first_rung = 0 if model.ladder is None else model.ladder.first
        # A frozen last block returns only the class token if the head reads nothing else.
        self.class_token_only = self.start == len(model.plan) and model.vit.global_pool == "token"
        self.kind = "exact" if self.class_token_only else settings.feature_cache
        side, self.device = model.image_size, next(model.parameters()).device
        with torch.no_grad():
            tokens, records = model.forward_features(torch.zeros(1, 3, side, side, device=self.device))
        self.traced = tokens.origin is not None
        self.dtype, self.fused, self.merged = tokens.x.dtype, tokens.fused, tokens.place is not None
        self.reports = {index: list(_reported(records[index])) for index in sorted(records)}
        self.reads = tokens.class_tokens is not None
        self.rungs = [(rung.read is not None, rung.kept is not None) for rung in tokens.rungs]
        parts = self._parts(tokens, records)
        images = sum(sizes.values())
        each = sum(p[0].numel() * p.element_size() for p in parts)
        self.bytes = images * self.views * each
        of_views = f" in {self.views} views" if self.views > 1 else ""
        require(
            self.bytes <= megabytes * 1e6,
            "data.feature_cache_mb",
            megabytes,
            f"at least {ceil(self.bytes / 1e6)}, for {images} images{of_views} of {each:,} bytes "
            f"({self.kind}); or data.feature_cache=int8, fewer data.views, or null to run the frozen blocks every time",
        )
        folder = settings.feature_cache_dir
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"data.feature_cache_dir = {folder!r}: no folder; make it, or null for memory")
        self.where = "" if folder is None else f" in {folder}"
        self.kept = {task: [_rows(count * self.views, part, folder) for part in parts] for task, count in sizes.items()}
        self.seen = {task: torch.zeros(self.views, count, dtype=torch.bool) for task, count in sizes.items()}

    def take_over(self, model: MultitaskViT, tasks: dict[str, TaskData]) -> None:
        """Prepare for a run of a model on the same device, with the same frozen blocks before `start`.

        Raises:
            ValueError: the blocks or the training images differ from those of an earlier run.
        """
        if self.key != model.features_key(self.start):
            raise ValueError(f"blocks 0 to {self.start - 1} of this model are not those whose features are cached")
        sizes = {name: len(data.train) for name, data in tasks.items()}
        if sizes != (kept := {task: seen.shape[1] for task, seen in self.seen.items()}):
            raise ValueError(f"features are cached for {kept} training images, and these are {sizes}")
        images = {name: data.train.digest() for name, data in tasks.items()}
        if other := [name for name in images if images[name] != self.images.get(name, images[name])]:
            raise ValueError(f"the cached features of {', '.join(other)} are those of other training images")
        self.images = images

    def __str__(self) -> str:
        images, blocks = sum(seen.shape[1] for seen in self.seen.values()), self.start
        source = f"blocks 0 to {blocks - 1}" if blocks else "the embedding"
        what = f"{self.views} views of {images}" if self.views > 1 else str(images)
        when = "once seen" if self.views > 1 else "from an image's second epoch on"
        return (
            f"feature cache: {self.bytes / 1e6:.0f} MB{self.where} for outputs of {source} on {what} training images "
            f"({self.kind}), reused {when}"
        )

    def contains(self, task: str, positions: np.ndarray, views: np.ndarray) -> bool:
        """Return whether the cache has these views of all these images of the task's training split.

        Args:
            positions, views: int64 (B,).
        """
        return bool(self.seen[task][torch.from_numpy(views), torch.from_numpy(positions)].all())

    def get(self, task: str, positions: np.ndarray, views: np.ndarray) -> Features:
        """Return cached features as `forward_features` returned them, up to the precision of `kind`."""
        rows = self._places(task, positions, views)
        parts = iter([kept[rows.to(kept.device)].to(self.device) for kept in self.kept[task]])
        x = next(parts).to(self.dtype)
        if self.kind == "int8":
            x = (x * next(parts)).to(self.dtype)
        read = next(parts) if self.reads else None
        origin = next(parts) if self.traced else None
        tokens = Tokens(x, origin, self.fused, next(parts) if self.merged else None, read)
        reports = {index: {name: next(parts) for name in names} for index, names in self.reports.items()}
        records = {index: Record(dropped=Dropped(**report)) for index, report in reports.items()}
        rungs = [Rung(next(parts) if reads else None, next(parts) if drops else None) for reads, drops in self.rungs]
        for index, rung in enumerate(rungs[1:], self._first_rung):
            if rung.kept is not None:
                rung.scores = records[index].dropped.scores
        tokens.rungs = tuple(rungs)
        return tokens, records

    def add(self, task: str, positions: np.ndarray, views: np.ndarray, features: Features) -> None:
        """Store the features of these views."""
        rows = self._places(task, positions, views)
        for kept, part in zip(self.kept[task], self._parts(*features), strict=True):
            kept[rows.to(kept.device)] = part.to(kept.device)
        self.seen[task].view(-1)[rows] = True

    def _places(self, task: str, positions: np.ndarray, views: np.ndarray) -> Tensor:
        return torch.from_numpy(views * self.seen[task].shape[1] + positions)

    def _parts(self, tokens: Tokens, records: dict[int, Record]) -> list[Tensor]:
        """Return the tensors to store, each with one row per image.

        int8 uses one scale per channel of an image. A few channels of the residual stream are far larger than the
        others, so one scale per token would round the small channels to zero.
        """
        x = tokens.x
        if self.kind == "int8":
            places = (2, 3) if x.ndim == 4 else 1  # of a ResNet's maps, and of tokens
            scale = (x.float().abs().amax(places, keepdim=True) / 127).clamp_(min=TINY)
            parts = [(x / scale).round_().to(torch.int8), scale]
        else:
            parts = [x.bfloat16() if self.kind == "bf16" else x]
        if tokens.class_tokens is not None:
            parts.append(tokens.class_tokens)
        parts += [part for part in (tokens.origin, tokens.place) if part is not None]
        for index in self.reports:
            parts += _reported(records[index]).values()
        for rung in tokens.rungs:
            parts += [part for part in (rung.read, rung.kept) if part is not None]
        return parts


def _reported(record: Record) -> dict[str, Tensor]:
    """Return the tensors in which a block recorded its dropping or merging, by name."""
    names = (field.name for field in dataclasses.fields(Dropped))
    return {name: part for name in names if (part := getattr(record.dropped, name)) is not None}


def _rows(count: int, like: Tensor, folder: str | None) -> Tensor:
    """Allocate `count` rows shaped like the first row of `like`: on its device, or memory-mapped to an unnamed file.

    Raises:
        OSError: not enough space in the folder.
    """
    shape = (count, *like.shape[1:])
    if folder is None:
        return like.new_empty(shape)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="moe-bsr-features-") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, prod(shape) * like.element_size()))
        return torch.from_file(file.name, shared=True, size=prod(shape), dtype=like.dtype).view(shape)


class CachedInputs(Inputs):
    """Inputs that replace images by features from the cache, and add the features of new views to it."""

    def __init__(self, inputs: Inputs, cache: FeatureCache, model: MultitaskViT) -> None:
        super().__init__(inputs.tasks, inputs.transforms, inputs.runtime, inputs.prefetch)
        self.cache, self.model = cache, model

    def batches(self, plan: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> Iterator[Batch]:
        return iter(Loader(self.tasks, self.transforms, plan, self.prefetch, self.cache.contains))

    def prepare(self, batch: Batch) -> Batch:
        task, cache, place = batch.task, self.cache, (batch.task, batch.positions, batch.views)
        labels = batch.labels.to(self.runtime.device)
        if not cache.contains(*place):
            images = super().prepare(batch).images
            with self.runtime.autocast():
                cache.add(*place, self.model.forward_features(images, task, upto=cache.start))
        tokens, records = cache.get(*place)
        with torch.no_grad(), self.runtime.autocast():
            for index in range(cache.start, self.model.path_start):  # if this model has more frozen blocks
                tokens = self.model.run_block(index, tokens, task, None, records)
        return dataclasses.replace(batch, images=None, labels=labels, features=(tokens, records))

    def cached_bytes(self) -> int:
        return super().cached_bytes() + (0 if self.cache.where else self.cache.bytes)

    def keeps_all(self) -> bool:
        return True

    def new_epochs(self) -> int:
        return self.cache.views

    def summary(self) -> list[str]:
        return [str(self.cache)]


def make_inputs(
    config: Config,
    model: MultitaskViT,
    tasks: dict[str, TaskData],
    transforms: ImageTransforms,
    runtime: Runtime,
    features: FeatureCache | None = None,
) -> Inputs:
    """Return the inputs for training this model: images, or cached features if `data.feature_cache_mb` is set.

    Args:
        features: a cache to share with earlier runs; None: make one if the configuration asks for it.
    """
    inputs = Inputs(tasks, transforms, runtime, config.data.prefetch)
    if features is None and config.data.feature_cache_mb:
        with runtime.autocast():
            features = FeatureCache(model, {name: len(data.train) for name, data in tasks.items()}, config.data)
    if features is None:
        return inputs
    features.take_over(model, tasks)
    return CachedInputs(inputs, features, model)
