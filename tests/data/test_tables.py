"""Test images that are listed in a CSV table, and Hugging Face datasets on disk."""

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_data import csv_task, huggingface_task, picture, save

from moe_bsr.config import ConfigError
from moe_bsr.data import load_spec, load_task
from moe_bsr.data.sources.csv_table import CsvTask


def table(folder: Path, text: str | bytes, **keys):
    (folder / "labels.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return CsvTask(name="mine", title="Mine", path="labels.csv", **keys).open(folder)


@pytest.fixture
def photos(tmp_path) -> Path:
    for n in range(6):
        save(tmp_path / "img" / f"{n}.png", n)
    return tmp_path


ROWS = [("img/0.png", "cat"), ("img/1.png", "dog"), ("img/2.png", "cat")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("header", ["path,label", "Label,FILENAME", "image,class,note", "file_name,Species"])
def test_usual_columns_and_delimiters_are_found(delimiter, header, photos):
    columns = header.split(",")
    swap = columns[0] == "Label"
    lines = [header.replace(",", delimiter)]
    lines += [delimiter.join((label, path) if swap else (path, label)) for path, label in ROWS]
    images = table(photos, "\r\n".join(lines))
    assert images.train.class_names == ["cat", "dog"] and images.train.labels.tolist() == [0, 1, 0]
    assert images.train.names == [path for path, _ in ROWS] and not images.unused
    assert (images.train.sizes == [(photos / path).stat().st_size for path, _ in ROWS]).all()
    assert np.array_equal(images.train.image(2), np.asarray(picture(2))) and images.test is images.val is None


def test_named_columns_quotes_a_byte_order_mark_and_backslashes(photos):
    text = '\ufeffwhere,what\r\n"img\\0.png","cat, ""black"""\r\nimg/1.png,  dog \r\n\r\n'
    images = table(photos, text, image_column="where", label_column="what")
    assert images.train.class_names == ['cat, "black"', "dog"] and len(images.train) == 2


@pytest.mark.parametrize(
    "above, line",
    [
        ("", "img/{0}.png, {1}"),
        ("", 'img/{0}.png, "{1}"'),
        ("sep=,\r\n", '"img/{0}.png","{1}"'),
        ('"sep=,"\n', "img/{0}.png,{1},"),
        ("\n  \n", "img/{0}.png,{1}"),
    ],
)
def test_spaces_beside_delimiters_and_lines_above_the_header_are_ignored(above, line, photos):
    rows = [line.format(n, ("ant", "bee")[n % 2]) for n in range(4)]
    images = table(photos, above + "\n".join(["path, label", *rows, "img/9.png,bee"]))
    assert images.train.class_names == ["ant", "bee"] and len(images.train) == 4
    number = 6 + above.count("\n")
    assert images.unused == [f"not used: 1 image that is not there, such as img/9.png (line {number})"]


def test_the_first_line_of_excel_names_the_delimiter(photos):
    images = table(photos, "sep=;\npath;label, of whom\nimg/0.png;a\nimg/1.png;b\n", label_column="label, of whom")
    assert images.train.class_names == ["a", "b"]


def test_lines_that_contradict_earlier_ones_are_reported_by_kind(photos):
    lines = ["path,label,split", *(f"img/{n}.png,{'ab'[n % 2]},train" for n in range(4))]
    lines += ["img/0.png,a,train", "img/1.png,a,train", "img/2.png,a,test", "img/../img/3.png,b,test"]
    images = table(photos, "\n".join(lines))
    assert len(images.train) == 4 and images.test is None
    assert images.unused == [
        "not used: 1 line about an image of an earlier line, such as img/0.png (line 6)",
        "not used: 1 line about an image of an earlier line, with another class, such as img/1.png (line 7)",
        "not used: 2 lines about images of earlier lines, with another split, such as img/2.png (line 8)",
    ]


def test_splits_of_the_table_are_used(photos):
    lines = "path,label,split\n" + "\n".join(
        f"img/{n}.png,{'cat' if n % 2 else 'dog'},{split}"
        for n, split in enumerate(["train", "Training", "valid", "VAL", "test", "holdout"])
    )
    images = table(photos, lines)
    assert (len(images.train), len(images.val), len(images.test)) == (2, 2, 1)
    assert images.unused == ["not used: 1 image of an unknown split, such as img/5.png (line 7): 'holdout'"]
    with pytest.raises(ValueError, match="class 'Cat' is not .*differs from 'cat' only in case"):
        table(photos, lines + "\nimg/5.png,Cat,test")


def test_paths_may_be_relative_to_images_or_absolute(photos):
    (photos / "tables").mkdir()
    (photos / "tables" / "t.csv").write_text(f"path,label\n0.png,cat\n{photos}/img/1.png,dog\n")
    for images in ("img", str(photos / "img")):
        found = CsvTask(name="mine", title="Mine", path="tables/t.csv", images=images).open(photos)
        assert len(found.train) == 2 and not found.unused


def test_image_names_do_not_depend_on_the_form_of_the_root_and_the_paths(photos, monkeypatch):
    """The names decide the splits, and a run identifies its images by name."""
    monkeypatch.chdir(photos.parent)
    for before in ("", "./", f"{photos}/"):
        (photos / "t.csv").write_text("path,label\n" + "".join(f"{before}{path},{label}\n" for path, label in ROWS))
        for root in (photos, Path(photos.name)):
            images = CsvTask(name="mine", title="Mine", path="t.csv").open(root)
            assert images.train.names == [path for path, _ in ROWS]


def test_lines_that_cannot_be_used_are_counted_by_kind(photos):
    os.mkfifo(photos / "img" / "fifo.png")
    (photos / "img" / "a.cr2").write_bytes(b"?")
    text = "path,label\nimg/0.png,cat\nimg/1.png,dog\nimg/9.png,cat\nimg/8.png,cat\nimg/2.png,\nimg/3.png\n,dog\n"
    text += "img/0.png,dog\nimg/fifo.png,cat\nimg/a.cr2,cat\nimg,cat\n"
    images = table(photos, text)
    assert len(images.train) == 2
    text = "\n".join(images.unused)
    for words in (
        "3 images, each of them not there, such as img/9.png (line 4)",
        "2 images without a label, such as img/2.png (line 6)",
        "1 line about an image of an earlier line, with another class, such as img/0.png (line 9)",
        "1 image that is a FIFO",
        "1 image that is a folder",
        "1 .cr2 file",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "image_column: none of the usual names"),
        (
            "foo,label\nimg/0.png,cat\n",
            "image_column: none of the usual names .* which has foo, label; set image_column",
        ),
        ("path,foo\nimg/0.png,cat\n", "label_column"),
        ("path,label\nnowhere.png,cat\n", r"no training images .*key images.*1 image that is not there"),
        ("path,label\n", "no training images"),
        ("path,label\nimg/0.png,caf\xe9\n".encode("latin-1"), "not UTF-8"),
        ("path,label\n".encode("utf-16"), "not UTF-8"),
        ('path,label\n"' + "x" * 200_000 + '",cat\n', "field larger"),
        ('path,label\nimg/0.png,"5 inch\nimg/1.png,cat\nimg/2.png,dog\n', "line 4: unexpected end of data .*quote"),
        ('path,label\nimg/0.png,"cat\nimg/1.png,dog\nimg/2.png,"cat\n', "line 4: ',' expected"),
        (
            'path,label\nimg/0.png,"cat\nimg/1.png,dog"\nimg/2.png,cat\n',
            "line 3: a line break .*never closed",
        ),
        ("path,label\nimg/0.png,cat\nimg/1.png,dog, wild\n", "line 3: 3 cells, and the header has 2; .*in quotes"),
        ("path,label\nimg/0\0.png,cat\n", "line 2: .*zero byte"),
    ],
)
def test_invalid_tables_are_refused_by_name(text, words, photos):
    with pytest.raises(ValueError, match=words) as error:
        table(photos, text)
    assert "labels.csv" in str(error.value)


def test_an_unknown_column_and_a_missing_table_are_refused(photos):
    with pytest.raises(ConfigError, match="label_column = 'lable': one of path, label .*did you mean 'label'"):
        table(photos, "path,label\nimg/0.png,cat\n", label_column="lable")
    with pytest.raises(FileNotFoundError, match="nothing.csv: no such table"):
        CsvTask(name="mine", title="Mine", path="nothing.csv").open(photos)


def test_a_csv_task(tmp_path):
    data = load_task(load_spec(csv_task(tmp_path)), root=tmp_path)
    assert len(data.train) + len(data.val) + len(data.test) == 24 and data.class_names == ["ant", "bee"]
    assert "table" in data.origin and len(data.test) >= 1


def test_a_directory_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = load_task(load_spec(huggingface_task(tmp_path)), root=tmp_path)
    assert len(data.train) + len(data.val) + len(data.test) == 24 and data.class_names == ["ant", "bee"]
    assert np.array_equal(data.train.source.image(5), np.asarray(picture(5)))
    assert (data.train.source.sizes == [len(data.train.source.encoded(i)) for i in range(24)]).all()
    whole = datasets.load_from_disk(str(tmp_path / "saved"))
    splits = {"train": whole, "validation": whole.select(range(4)), "test": whole.select(range(6)), "odd": whole}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "dict.yaml").write_text("title: Dict\nsource: huggingface\npath: dict\n")
    data = load_task(load_spec(tmp_path / "dict.yaml"), root=tmp_path)
    assert [len(split) for split in (data.train, data.val, data.test)] == [24, 4, 6]
    assert any("1 split of unknown name, such as odd" in note for note in data.notes)


def test_a_split_without_labels_is_absent(tmp_path):
    """As test splits on the Hugging Face hub often are: every label is -1."""
    datasets = pytest.importorskip("datasets")
    load_task(load_spec(huggingface_task(tmp_path)), root=tmp_path)
    whole = datasets.load_from_disk(str(tmp_path / "saved"))
    hidden = whole.select(range(6)).map(lambda row: row | {"label": -1}, features=whole.features)
    for name, splits in (("part", {"train": whole, "test": hidden}), ("none", {"train": hidden})):
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / name))
        (tmp_path / f"{name}.yaml").write_text(f"title: Dict\nsource: huggingface\npath: {name}\n")
    data = load_task(load_spec(tmp_path / "part.yaml"), root=tmp_path)
    assert len(data.test) > 0 and any("are set aside" in note for note in data.notes)
    assert any("6 rows without an image or a label" in note for note in data.notes)
    with pytest.raises(ValueError, match="its train split has no images with labels"):
        load_task(load_spec(tmp_path / "none.yaml"), root=tmp_path)


@pytest.mark.parametrize("labels", [["x", "y"], [7, 10]])
def test_huggingface_labels_may_be_text_numbers_or_missing(labels, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [picture(n) for n in range(10)], "label": [labels[n % 2] for n in range(9)] + [None]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "hub.yaml").write_text("title: Hub\nsource: huggingface\npath: saved\n")
    data = load_task(load_spec(tmp_path / "hub.yaml"), root=tmp_path)
    assert data.class_names == sorted(map(str, labels))
    assert any("1 row without an image or a label" in note for note in data.notes)


def test_a_directory_not_saved_by_datasets_is_refused(tmp_path):
    (tmp_path / "hub.yaml").write_text("title: Hub\nsource: huggingface\npath: saved\n")
    with pytest.raises(FileNotFoundError, match="save_to_disk"):
        load_task(load_spec(tmp_path / "hub.yaml"), root=tmp_path)
    pytest.importorskip("datasets")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="saved: not a readable dataset"):
        load_task(load_spec(tmp_path / "hub.yaml"), root=tmp_path)
