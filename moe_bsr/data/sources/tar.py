"""Images in tar shards as WebDataset writes them, on this machine or by address, read by their place."""

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
from moe_bsr.data.tar_index import TarIndex
from moe_bsr.data.unused import Unused

MOST_SHARDS = 100_000  # that one pattern may mean

Patterns = str | list[str]


@SOURCES.register("tar")
@dataclass(frozen=True, kw_only=True)
class TarTask(TaskSpec):
    """Shards by split, such as `train-{000000..000146}.tar`.

    Attributes:
        train, val, test: paths (absolute, or below the data root; `*` is expanded) or addresses with `://`; one pattern
            or a list of them. {a..b} is a range of numbers as wide as they are written, {a,b} a choice.
        image_column: ending of the image files, where a sample has several.
        label_column: where the labels stand: cls, txt, json.FIELD, folder or another ending; null: the first of cls,
            json and txt that there is, else the folder that an image is in.
        class_names: a file with a name a line, below the data root, or a list: what the numbers mean, and in which
            order text is numbered. null: what the training shards have, in order.
        cache: folder, below the data root, of the shards' indexes and of what was fetched. cache_gb: 10**9 bytes that
            the latter may take there.
    """

    may_change: ClassVar[tuple[str, ...]] = (*TaskSpec.may_change, "train", "val", "test", "cache", "cache_gb")

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
        require(0 <= self.cache_gb <= 10**6, "cache_gb", self.cache_gb, "0 (nothing is kept) to 1,000,000")

    def open(self, root: Path, download: bool = False) -> TaskImages:
        cache = ShardCache(root / Path(self.cache).expanduser(), int(self.cache_gb * 1e9))
        names: Sequence[str] | None = None
        if isinstance(self.class_names, str):
            names = read_lines(root / Path(self.class_names).expanduser(), "class name")
        elif self.class_names:
            names = self.class_names
        unused, sources, told = Unused(), dict[str, TarSource](), []
        for split in ("train", "val", "test"):
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
                raise ValueError(f"{split}: the shards have their labels in different places: {said}: say label_column")
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
    """The images of some shards, in their order.

    Args:
        opened: shards with their indexes.
        names: what classes are called, where somebody says so. fixed: the classes of the training shards.
        where: for messages. unused: where to count what is not used.
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
            texts = ["" if text.startswith("-") else text for text in texts]  # a test set's -1
        self.class_names, numbers = _classes(set(texts) - {""}, names, fixed, where)
        labelled = np.array([bool(text) for text in texts])
        self.names = _distinct(opened)
        if len(lost := np.flatnonzero(~labelled)):
            unused.add("image without a label", "images without a label", self.names[lost[0]], count=len(lost))
        rows = np.flatnonzero(labelled)
        if not len(rows):
            raise ValueError(f"{where}: no images with labels; there is {'; '.join(unused.found()) or 'nothing'}")
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
        """Begin to fetch these images: they will be asked for soon."""
        self._ahead.expect(i for i in places if not self._shards[self._shard[i]].has(self._place[i]))

    def _read(self, i: int) -> bytes:
        return self._shards[self._shard[i]].read(int(self._place[i]))


def _classes(
    texts: set[str], names: Sequence[str] | None, fixed: list[str] | None, where: str
) -> tuple[list[str], dict[str, int]]:
    """The classes' names, and the number of each text that labels have."""
    numeric = all(text.isdecimal() for text in texts)
    if names is not None and numeric and not texts <= set(names):
        if (most := max(map(int, texts), default=0)) >= len(names):
            raise ValueError(
                f"{where}: there is a label {most}, and class_names has {len(names)}: 0 to {len(names) - 1}"
            )
        return list(names), {text: int(text) for text in texts}
    if names is None:
        names = fixed or sorted(texts, key=lambda text: (int(text), text) if numeric else (0, text))
    if unknown := sorted(texts - set(names)):
        raise unknown_class(unknown[0], names, where)
    return list(names), {text: number for number, text in enumerate(names)}


def _distinct(opened: Sequence[tuple[Shard, TarIndex]]) -> list[str]:
    """The images' names, each its own: one that an earlier image has gets its shard's before it."""
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
    """The shards that patterns mean. Raises FileNotFoundError for a `*` that means none, ValueError for a pattern."""
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
        raise ValueError(f"{twice}: this shard is named twice: each once")
    if not found:
        raise ValueError("a list of no shards: name them, or leave the key out")
    return found


def expanded(pattern: str) -> list[str]:
    """What the braces of a pattern mean: {000..146} numbers of that width, {a,b} one or the other."""
    if (braces := re.search(r"\{([^{}]*)\}", pattern)) is None:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1], re.ASCII)
    if ends:
        first, last = int(ends[1]), int(ends[2])
        if not 0 <= last - first < MOST_SHARDS:
            raise ValueError(f"{pattern}: {{a..b}} rises, and means at most {MOST_SHARDS:,} shards")
        width = max(len(ends[1]), len(ends[2])) if ends[1].startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(first, last + 1)]
    elif "," in braces[1]:
        choices = braces[1].split(",")
    else:
        raise ValueError(f"{pattern}: {braces[0]} is neither a range, as {{000..146}}, nor a choice, as {{a,b}}")
    rest = expanded(pattern[braces.end() :])
    if len(choices) * len(rest) > MOST_SHARDS:
        raise ValueError(f"{pattern}: it means {len(choices) * len(rest):,} shards, and at most {MOST_SHARDS:,} go")
    return [pattern[: braces.start()] + choice + end for choice in choices for end in rest]


def _ending(column: str | None) -> str | None:
    return None if column is None else column.removeprefix(".").lower()


def _label_place(column: str | None) -> str | None:
    """As `_ending`, but a JSON field's name is left as it is written."""
    bare = column and column.removeprefix(".")
    return f"json.{bare[5:]}" if bare and bare[:5].lower() == "json." else _ending(column)


def _short(patterns: Patterns) -> str:
    return patterns if isinstance(patterns, str) else f"{patterns[0]}{' ...' * (len(patterns) > 1)}"
