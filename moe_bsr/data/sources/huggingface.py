"""Source "huggingface": a directory written by `save_to_disk` of the Hugging Face library `datasets`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_bsr.config import ConfigError
from moe_bsr.data.class_names import SPLIT_NAMES, composed, look_alikes, split_named, unknown_class
from moe_bsr.data.image_files import decode
from moe_bsr.data.spec import SOURCES, TaskImages, TaskSpec
from moe_bsr.data.unused import Unused


@SOURCES.register("huggingface")
@dataclass(frozen=True, kw_only=True)
class HuggingFaceTask(TaskSpec):
    """A directory with a Dataset, or with a DatasetDict of splits.

    Attributes:
        path: the directory, absolute or below the data root.
        image_column, label_column: names of the columns; null: the only column of type Image, and the only one of type
            ClassLabel or with a usual name.
    """

    path: str
    image_column: str | None = None
    label_column: str | None = None

    def folder(self, root: Path) -> Path:
        return root / Path(self.path).expanduser()

    def open(self, root: Path, download: bool = False) -> TaskImages:
        folder, unused = self.folder(root), Unused()
        splits: dict[str, Any] = {}
        for name, dataset in _load(folder).items():
            split = split_named(name)
            if split is None:
                unused.add("split of unknown name", "splits of unknown names", f"{name} ({len(dataset)} images)")
            elif split in splits:
                raise ValueError(f"{folder}: two splits for {split}, one of them {name!r}: keep one")
            else:
                splits[split] = dataset
        if "train" not in splits:
            raise ValueError(f"{folder}: no train split; found: {', '.join(splits) or 'none'}")
        image, label = _columns(splits["train"], self.image_column, self.label_column, folder)
        sources: dict[str, HuggingFaceSource] = {}
        for split in SPLIT_NAMES:  # train first
            if split in splits:
                known = sources["train"].class_names if sources else None
                sources[split] = HuggingFaceSource(
                    splits[split], image, label, f"{folder}, {split}", known, self.bits, unused
                )
        return TaskImages(
            train=sources["train"],
            val=sources.get("val") or None,  # splits without labels, as many test splits are, are absent
            test=sources.get("test") or None,
            origin=f"Hugging Face dataset {folder}",
            unused=[*unused.lines(), *look_alikes(sources["train"].class_names)],
        )


def _load(folder: Path) -> dict[str, Any]:
    """Load the splits in a directory, by name."""
    if not (folder / "dataset_dict.json").is_file() and not (folder / "state.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no dataset_dict.json or state.json; expected a directory that "
            "datasets.Dataset.save_to_disk or datasets.DatasetDict.save_to_disk wrote"
        )
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises many kinds of exceptions on a damaged directory
        raise ValueError(f"{folder}: not a readable dataset ({error})") from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


def _columns(dataset: Any, image: str | None, label: str | None, folder: Path) -> tuple[str, str]:
    """Return the names of the image column and the label column."""
    import datasets

    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name in ("label", "labels", "class", "category", "target") if name in features]
    for key, given, found in (("image_column", image, images), ("label_column", label, labels)):
        if given is None and len(found) != 1:
            raise ConfigError(
                f"{key}: {', '.join(found) or 'none'} of the columns of {folder} could be meant, which are "
                f"{', '.join(features)}; set {key}"
            )
        if given is not None and given not in features:
            raise ConfigError(f"{key} = {given!r}: one of {', '.join(features)} ({folder})")
    return image or images[0], label or labels[0]


class HuggingFaceSource:
    """Source of the images of one split. Their names are their paths, if all images have different ones.

    Args:
        image, label: names of the columns.
        where: name of the split in messages.
        class_names: the classes of the training split; None for that split itself.
        bits: bit depth of the values in 16-bit images, see `TaskSpec.bits`.
        unused: counter of rows without an image or a label.
    """

    def __init__(
        self,
        dataset: Any,
        image: str,
        label: str,
        where: str,
        class_names: Sequence[str] | None,
        bits: int | None,
        unused: Unused,
    ) -> None:
        import datasets
        import pyarrow.compute as pc

        if isinstance(dataset.features[image], datasets.Image):
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
        elif dataset.features[image] != datasets.Value("string"):
            raise ConfigError(f"image_column = {image!r}: expected a column of images or of paths ({where})")
        self._dataset, self._image, self._where, self._bits = dataset, image, where, bits
        feature, values = dataset.features[label], dataset.with_format(None)[label][:]
        if isinstance(feature, datasets.ClassLabel):
            own = [None if v is None or v < 0 else composed(feature.names[v]) for v in values]
            names = [composed(name) for name in feature.names]
        else:
            own = [None if v is None or v == "" else composed(str(v)) for v in values]
            names = sorted({name for name in own if name is not None})
        column = dataset.with_format("arrow")[:].column(image)  # memory-mapped, not read
        if isinstance(dataset.features[image], datasets.Image):
            paths = pc.struct_field(column, "path").to_pylist()
            sizes = pc.fill_null(pc.binary_length(pc.struct_field(column, "bytes")), -1).to_numpy()
        else:
            paths, sizes = column.to_pylist(), np.full(len(column), -1)
        labels = {i: name for i, name in enumerate(own) if name is not None and (sizes[i] >= 0 or paths[i])}
        rows = list(labels)
        if lost := len(own) - len(rows):
            first = next((at for at, i in enumerate(rows) if at != i), len(rows))
            kind = "without an image or a label"
            unused.add(f"row {kind}", f"rows {kind}", f"row {first} of {where}", count=lost)
        self.class_names = names if class_names is None else list(class_names)
        position = {name: i for i, name in enumerate(self.class_names)}
        if unknown := sorted(set(labels.values()) - position.keys()):
            raise unknown_class(unknown[0], self.class_names, where)
        self.labels = np.array([position[name] for name in labels.values()], dtype=np.int64)
        self._rows = rows
        named = [paths[i] for i in rows]
        self.names = named if all(named) and len(set(named)) == len(named) else None
        self.sizes: np.ndarray | None = np.asarray(sizes, dtype=np.int64)[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, i: int) -> np.ndarray:
        return decode(self._content(i), f"image {self._rows[i]} of {self._where}", self._bits)

    def encoded(self, i: int) -> bytes | None:
        content = self._content(i)
        return content.read_bytes() if isinstance(content, Path) else content

    def _content(self, i: int) -> bytes | Path:
        entry = self._dataset[self._rows[i]][self._image]
        if isinstance(entry, str):
            return Path(entry)
        return entry["bytes"] if entry["bytes"] is not None else Path(entry["path"])
