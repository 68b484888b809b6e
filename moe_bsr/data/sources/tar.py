"""Source "tar": images in tar shards with WebDataset's layout, local or remote, which are read by their offsets."""

import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from moe_bsr.config import require
from moe_bsr.data.addresses import is_remote
from moe_bsr.data.class_names import look_alikes, unknown_class
from moe_bsr.data.fetching import ReadAhead
from moe_bsr.data.image_files import decode
from moe_bsr.data.packed import read_lines
from moe_bsr.data.shards import Shard, ShardCache, open_shards
from moe_bsr.data.spec import SOURCES, TaskImages, TaskSpec
from moe_bsr.data.splits import SPLITS
from moe_bsr.data.tar_index import TarIndex
from moe_bsr.data.unused import Unused

MOST_SHARDS = 100_000  # per pattern

Patterns = str | list[str]


@SOURCES.register("tar")
@dataclass(frozen=True, kw_only=True)
class TarTask(TaskSpec):
    """Shards by split, such as `train-{000000..000146}.tar`.

    Attributes:
        train, val, test: a pattern or a list of patterns: paths (absolute, or below the data root; `*` is expanded) or
            addresses with `://`. {a..b} is a range of numbers, with leading zeros if written so; {a,b} is a choice.
        image_column: ending of the image files; needed if a sample has several images.
        label_column: where the labels are: cls, txt, json.FIELD, folder or another ending; null: the first of cls, json
            and txt that exists, else the folder of the image.
        class_names: a list, or a file below the data root with one name per line. It names numeric labels, and gives
            the order of text labels. null: the sorted labels of the training shards.
        cache: folder, below the data root, for the shards' indexes and the fetched images.
        cache_gb: limit of the fetched images, in 10**9 bytes.
    """

    may_change: ClassVar[tuple[str, ...]] = (*TaskSpec.may_change, *SPLITS, "cache", "cache_gb")

    train: Patterns
    val: Patterns | None = None
    test: Patterns | None = None
    image_column: str | None = None
    label_column: str | None = None
    class_names: Patterns | None = None
    cache: str = "shard_cache"
    cache_gb: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.cache_gb <= 10**6, "cache_gb", self.cache_gb, "0 (keep no images) to 1,000,000")

    def open(self, root: Path, download: bool = False) -> TaskImages:
        cache = ShardCache(root / Path(self.cache).expanduser(), int(self.cache_gb * 1e9))
        names: Sequence[str] | None = None
        if isinstance(self.class_names, str):
            names = read_lines(root / Path(self.class_names).expanduser(), "class name")
        elif self.class_names:
            names = self.class_names
        unused, sources, told = Unused(), dict[str, TarSource](), []
        for split in SPLITS:
            if (patterns := getattr(self, split)) is None:
                continue
            addresses = _addresses(patterns, root)
            opened = open_shards(addresses, root, cache, _ending(self.image_column), _label_place(self.label_column))
            told.append(f"{split} {len(opened)} ({_short(patterns)})")
            where = opened[0][0].address
            columns: dict[str, str] = {}
            for shard, index in opened:
                if index.names:
                    columns.setdefault(index.column, shard.address)
            if len(columns) > 1:
                said = " and ".join(f"{column} ({address})" for column, address in [*columns.items()][:2])
                raise ValueError(f"{split}: the shards have their labels in different places: {said}: set label_column")
            fixed = sources["train"].class_names if sources else None
            sources[split] = TarSource(opened, names, fixed, f"{split} shards ({where})", unused, self.bits)
        return TaskImages(
            train=sources["train"],
            val=sources.get("val"),
            test=sources.get("test"),
            origin=f"tar shards: {', '.join(told)}",
            unused=[*unused.lines(), *look_alikes(sources["train"].class_names)],
        )


class TarSource:
    """Source of the images of some shards, in their order.

    Args:
        opened: shards with their indexes.
        names: class names from the task file, or None.
        fixed: the classes of the training shards; None for these shards themselves.
        where: name of the shards in messages.
        unused: counter for everything that is not used.
        bits: bit depth of the values in 16-bit images, see `TaskSpec.bits`.
    """

    def __init__(
        self,
        opened: Sequence[tuple[Shard, TarIndex]],
        names: Sequence[str] | None,
        fixed: list[str] | None,
        where: str,
        unused: Unused,
        bits: int | None,
    ) -> None:
        self._shards, self._bits = [shard for shard, _ in opened], bits
        for _, index in opened:
            for one, many, example, what_to_do, count in index.unused:
                unused.add(one, many, example, what_to_do, count)
        texts = [label for _, index in opened for label in index.labels]
        if all(re.fullmatch(r"-?\d+|", text, re.ASCII) for text in set(texts)):
            texts = ["" if text.startswith("-") else text for text in texts]  # -1 in a test set: no label
        self.class_names, numbers = _classes(set(texts) - {""}, names, fixed, where)
        labelled = np.array([bool(text) for text in texts])
        self.names = _distinct(opened)
        if len(lost := np.flatnonzero(~labelled)):
            unused.add("image without a label", "images without a label", self.names[lost[0]], count=len(lost))
        rows = np.flatnonzero(labelled)
        if not len(rows):
            raise ValueError(f"{where}: no images with labels; found: {'; '.join(unused.found()) or 'nothing'}")
        counts = [len(index.names) for _, index in opened]
        self._shard = np.repeat(np.arange(len(opened), dtype=np.int32), counts)[rows]
        self._place = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])[rows]
        self.labels = np.array([numbers[texts[row]] for row in rows], dtype=np.int64)
        self.sizes = np.concatenate([shard.sizes for shard in self._shards])[rows]
        self.names = [self.names[row] for row in rows]
        self._ahead = ReadAhead(self._read, self.sizes)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> np.ndarray:
        return decode(self.encoded(i), f"{self._shards[self._shard[i]].address}: {self.names[i]}", self._bits)

    def encoded(self, i: int) -> bytes:
        return self._ahead.take(i)

    def expect(self, places: Iterable[int]) -> None:
        """Start to fetch these images, because they are needed soon."""
        self._ahead.expect(i for i in places if not self._shards[self._shard[i]].has(self._place[i]))

    def _read(self, i: int) -> bytes:
        return self._shards[self._shard[i]].read(int(self._place[i]))


def _classes(
    texts: set[str], names: Sequence[str] | None, fixed: list[str] | None, where: str
) -> tuple[list[str], dict[str, int]]:
    """Return the class names, and the class index of each label text. `names` and `fixed` are as in `TarSource`."""
    numeric = all(text.isdecimal() for text in texts)
    if names is not None and numeric and not texts <= set(names):
        if (most := max(map(int, texts), default=0)) >= len(names):
            raise ValueError(
                f"{where}: there is a label {most}, but class_names has {len(names)} names: 0 to {len(names) - 1}"
            )
        return list(names), {text: int(text) for text in texts}
    if names is None:
        names = fixed or sorted(texts, key=lambda text: (int(text), text) if numeric else (0, text))
    if unknown := sorted(texts - set(names)):
        raise unknown_class(unknown[0], names, where)
    return list(names), {text: number for number, text in enumerate(names)}


def _distinct(opened: Sequence[tuple[Shard, TarIndex]]) -> list[str]:
    """Return distinct names of all images. The name of the shard is put before one that an earlier image has."""
    seen: set[str] = set()
    names: list[str] = []
    for number, (shard, index) in enumerate(opened):
        for name in index.names:
            for longer in (name, f"{shard.address.rpartition('/')[2]}/{name}", f"shard {number}/{name}"):
                if longer not in seen:
                    break
            seen.add(longer)
            names.append(longer)
    return names


def _addresses(patterns: Patterns, root: Path) -> list[str]:
    """Expand patterns to addresses. Raises FileNotFoundError if a `*` matches nothing, ValueError for a bad pattern."""
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for address in expanded(pattern):
            if "*" in address and not is_remote(address):
                path = str(root / Path(address).expanduser())
                if not (there := sorted(glob.glob(path, recursive=True))):
                    raise FileNotFoundError(f"{path}: no such shards")
                found += [str(Path(each).absolute()) for each in there]
            else:
                found.append(address)
    if twice := next((each for each in found if found.count(each) > 1), None) if len(set(found)) < len(found) else None:
        raise ValueError(f"{twice}: this shard is listed twice: list it once")
    if not found:
        raise ValueError("a list without shards: name some, or leave the key out")
    return found


def expanded(pattern: str) -> list[str]:
    """Expand the braces of a pattern: {000..146} to numbers of that width, {a,b} to each choice."""
    if (braces := re.search(r"\{([^{}]*)\}", pattern)) is None:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1], re.ASCII)
    if ends:
        first, last = int(ends[1]), int(ends[2])
        if not 0 <= last - first < MOST_SHARDS:
            raise ValueError(f"{pattern}: {{a..b}} must rise and name at most {MOST_SHARDS:,} shards")
        width = max(len(ends[1]), len(ends[2])) if ends[1].startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(first, last + 1)]
    elif "," in braces[1]:
        choices = braces[1].split(",")
    else:
        raise ValueError(f"{pattern}: {braces[0]} is neither a range such as {{000..146}} nor a choice such as {{a,b}}")
    rest = expanded(pattern[braces.end() :])
    if len(choices) * len(rest) > MOST_SHARDS:
        raise ValueError(f"{pattern}: {len(choices) * len(rest):,} shards, but at most {MOST_SHARDS:,} are possible")
    return [pattern[: braces.start()] + choice + end for choice in choices for end in rest]


def _ending(column: str | None) -> str | None:
    return None if column is None else column.removeprefix(".").lower()


def _label_place(column: str | None) -> str | None:
    """Normalize a label column like `_ending`, but keep the case of a JSON field's name."""
    bare = column and column.removeprefix(".")
    return f"json.{bare[5:]}" if bare and bare[:5].lower() == "json." else _ending(column)


def _short(patterns: Patterns) -> str:
    return patterns if isinstance(patterns, str) else f"{patterns[0]}{' ...' * (len(patterns) > 1)}"
