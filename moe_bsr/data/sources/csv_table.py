"""Source "csv": images listed in a CSV file, one line per image."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from moe_bsr.config import ConfigError
from moe_bsr.config.errors import nearest
from moe_bsr.data.class_folders import count_no_image
from moe_bsr.data.class_names import LABEL_COLUMNS, SPLIT_NAMES, composed, look_alikes, split_named, unknown_class
from moe_bsr.data.formats import EXTENSIONS
from moe_bsr.data.image_files import FileSource, file_kind
from moe_bsr.data.spec import SOURCES, TaskImages, TaskSpec
from moe_bsr.data.splits import SPLITS
from moe_bsr.data.unused import Unused

# Usual names of the columns, the most likely first.
IMAGE = ("image", "path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "img", "img_path")
LABEL = LABEL_COLUMNS
SPLIT = ("split", "set", "subset", "partition")


@SOURCES.register("csv")
@dataclass(frozen=True, kw_only=True)
class CsvTask(TaskSpec):
    """A CSV file with a header, delimited by commas, semicolons, tabs or vertical bars.

    Attributes:
        path: path of the file, absolute or below the data root.
        images: folder that the paths in the table start from, absolute or below the data root; null: the table's own.
        image_column, label_column, split_column: names of the columns; null: the first of `IMAGE`, `LABEL` and `SPLIT`
            that the header has, upper or lower case. Without a split column all images are for training.
    """

    path: str
    images: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None

    def folder(self, root: Path) -> Path:
        return (root / Path(self.path).expanduser()).parent

    def open(self, root: Path, download: bool = False) -> TaskImages:
        table = root / Path(self.path).expanduser()
        folder = table.parent if self.images is None else root / Path(self.images).expanduser()
        if not table.is_file():
            raise FileNotFoundError(f"{table}: no such table; path names a CSV file")
        rows: dict[str, list[tuple[Path, str]]] = {split: [] for split in SPLIT_NAMES}
        seen: dict[str, tuple[str, str]] = {}
        unused = Unused()
        for line, name, label, split_name in self._rows(table):
            where = f"{name or 'nothing'} (line {line})"
            split = "train" if split_name is None else split_named(split_name)
            file = _file(folder, name)
            kind = file_kind(file) if name else "not there"
            if not label:
                unused.add("image without a label", "images without a label", where)
            elif split is None:
                unused.add("image of an unknown split", "images of an unknown split", f"{where}: {split_name!r}")
            elif kind != "file":
                unused.add(f"image that is {kind}", f"images, each of them {kind}", where)
            elif file.suffix and file.suffix.lower() not in EXTENSIONS:
                count_no_image(str(file), unused)
            elif (earlier := seen.get(path := os.path.normpath(file))) is not None:
                contrary = "" if earlier == (split, label) else ", with another "
                contrary += contrary and ("split" if earlier[1] == label else "class")
                one, many = "line about an image of an earlier line", "lines about images of earlier lines"
                unused.add(one + contrary, many + contrary, where)
            else:
                seen[path] = split, label
                rows[split].append((file, label))
        names = sorted({label for _, label in rows["train"]})
        if not names:
            what = "; ".join(unused.found()) or "no line"
            raise ValueError(f"{table}: no training images (paths start from {folder}, key images); found: {what}")
        train, val, test = (
            self._source(rows[split], names, folder, f"{table}, {split}") if rows[split] else None for split in SPLITS
        )
        assert train is not None
        return TaskImages(
            train=train,
            val=val,
            test=test,
            origin=f"table {table}",
            unused=[*unused.lines(), *look_alikes(names)],
        )

    def _source(self, rows: list[tuple[Path, str]], names: list[str], folder: Path, where: str) -> FileSource:
        position = {name: label for label, name in enumerate(names)}
        if unknown := sorted({label for _, label in rows} - position.keys()):
            raise unknown_class(unknown[0], names, where)
        labels = np.array([position[label] for _, label in rows], dtype=np.int64)
        return FileSource([file for file, _ in rows], labels, names, folder, self.bits)

    def _rows(self, table: Path) -> Iterator[tuple[int, str, str, str | None]]:
        """Yield (line number, path, label, split) of each image, stripped. Split is None if there is no such column."""
        try:
            with table.open(encoding="utf-8-sig", newline="") as stream:
                header, above, delimiter = _header(stream)
                columns = [
                    column.strip()
                    for column in next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])
                ]
                image, label, split = (
                    _column(columns, given, usual, key, table)
                    for given, usual, key in (
                        (self.image_column, IMAGE, "image_column"),
                        (self.label_column, LABEL, "label_column"),
                        (self.split_column, SPLIT, "split_column"),
                    )
                )
                assert image is not None and label is not None
                # Strict: a quote that is never closed would swallow the lines that follow.
                reader = csv.reader(stream, delimiter=delimiter, skipinitialspace=True, strict=True)
                try:
                    for row in reader:
                        cells = [cell.strip() for cell in row] + [""] * len(columns)
                        read = [cells[image], composed(cells[label]), *([] if split is None else [cells[split]])]
                        if any(cells[len(columns) :]):
                            raise ValueError(
                                f"{table}, line {reader.line_num + above}: {len(row)} cells, and the header has "
                                f"{len(columns)}; a cell that contains a {delimiter!r} must be in quotes"
                            )
                        if any(letter in cell for cell in read for letter in "\0\n\r"):
                            raise csv.Error("a line break or zero byte in a cell")
                        if row:
                            yield reader.line_num + above, read[0], read[1], None if split is None else read[2]
                except csv.Error as error:
                    line = reader.line_num + above
                    quote = "a quote that is never closed, or not directly beside a delimiter"
                    raise ValueError(f"{table}, line {line}: {error} ({quote}?)") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{table}: not UTF-8: save it as CSV UTF-8") from error


def _header(stream: TextIO) -> tuple[str, int, str]:
    """Return the line with the column names, its line number, and the delimiter.

    Empty lines and Excel's `sep=;` may come before it.
    """
    number, delimiter = 0, ""
    for number, line in enumerate(iter(stream.readline, ""), start=1):
        if said := re.fullmatch(r'"?sep=(.)"?', line.rstrip("\r\n"), re.IGNORECASE):
            delimiter = said[1]
        elif line.strip():
            return line, number, delimiter or max(",;\t|", key=line.count)
    return "", number, ","


def _column(columns: list[str], given: str | None, usual: Sequence[str], key: str, table: Path) -> int | None:
    """Return the index of a column; None if there is no split column. Raises ConfigError if another one is missing."""
    if given is not None:
        if given not in columns:
            raise ConfigError(f"{key} = {given!r}: one of {', '.join(columns)} ({table}){nearest(given, columns)}")
        return columns.index(given)
    folded = [column.casefold() for column in columns]
    found = next((folded.index(name) for name in usual if name in folded), None)
    if found is None and usual is not SPLIT:
        raise ConfigError(
            f"{key}: none of the usual names ({', '.join(usual)}) is in the header of {table}, which has "
            f"{', '.join(columns) or 'no columns'}; set {key}"
        )
    return found


def _file(folder: Path, name: str) -> Path:
    """Return the file of a path in a table. Backslashes are tried as separators if there is no file of that name."""
    file = folder / name
    return folder / name.replace("\\", "/") if "\\" in name and not file.exists() else file
