"""Test packs: they are written, read back and memory-mapped, and refused if they are damaged."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moe_bsr.data import load_spec, load_task
from moe_bsr.data.packed import PackedSource, PackWriter, encode, open_pack, write_classes, write_splits
from moe_bsr.data.sources.folder import FolderSource


def picture(seed: int, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height))


class Pixels:
    """Source of random square images in memory, with two classes."""

    class_names = ["even", "odd"]
    names = sizes = None

    def __init__(self, count: int, side: int):
        self.labels = np.arange(count) % 2
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        return self.pixels[i]


def write_pack(folder: Path, source, short_side=256, quality=90) -> Path:
    folder.mkdir(exist_ok=True)
    write_classes(folder, source.class_names)
    with PackWriter(folder / "train.npz") as writer:
        for i in range(len(source)):
            writer.add(encode(source, i, short_side, quality), int(source.labels[i]))
    return folder / "train.npz"


@pytest.fixture
def pack(tmp_path) -> Path:
    return write_pack(tmp_path / "pixels", Pixels(5, 8))


def test_pixels_are_packed_without_loss(tmp_path):
    source = Pixels(7, 9)
    packed = PackedSource(write_pack(tmp_path / "p", source))
    assert packed.class_names == source.class_names and len(packed) == 7
    np.testing.assert_array_equal(packed.labels, source.labels)
    for i in range(7):
        np.testing.assert_array_equal(packed.image(i), source.image(i))


def test_small_files_keep_their_bytes_and_large_ones_shrink(tmp_path):
    for name, size in (("small.jpg", (50, 40)), ("small.png", (32, 60)), ("wide.jpg", (160, 80))):
        (tmp_path / "in" / "things").mkdir(parents=True, exist_ok=True)
        picture(1, *size).save(tmp_path / "in" / "things" / name)
    source = FolderSource(tmp_path / "in")
    packed = PackedSource(write_pack(tmp_path / "p", source, short_side=40))
    assert packed.encoded(0) == source.encoded(0) and packed.encoded(1) == source.encoded(1)
    assert packed.image(2).shape == (40, 80, 3)
    expected = picture(1, 160, 80).resize((80, 40), Image.Resampling.BICUBIC)
    assert np.abs(packed.image(2) - np.asarray(expected, dtype=float)).mean() < 3


def test_plain_numpy_reads_a_pack(pack):
    with np.load(pack, allow_pickle=False) as members:
        assert {name: members[name].dtype.name for name in members.files} == {
            "jpeg": "uint8", "offsets": "int64", "labels": "int64",
        }  # fmt: skip
        offsets = members["offsets"]
        first = members["jpeg"][offsets[0] : offsets[1]].tobytes()
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(first))), Pixels(5, 8).image(0))
    assert sorted(p.name for p in pack.parent.iterdir()) == ["classes.txt", "train.npz"]


def test_stored_images_are_memory_mapped(pack):
    source = PackedSource(pack)
    assert isinstance(source.jpeg, np.memmap) and Path(source.jpeg.filename) == pack
    content = bytearray(pack.read_bytes())
    start = source.jpeg.offset
    assert content[start : start + len(source.jpeg)] == source.jpeg.tobytes()
    content[start] ^= 255  # change one byte on disk in place: a copy in memory would not show it
    before = int(source.jpeg[0])
    with open(pack, "r+b") as file:
        file.write(content)
    assert int(source.jpeg[0]) == before ^ 255


def test_class_names_are_read_as_written(tmp_path):
    names = ["tab\there", "\x1b[31m", "a\x85b", "a\u2028b", "a\x0bb", "a\rb", " spaces ", "caf\u00e9", "$$"]
    write_classes(tmp_path, names)
    source = Pixels(5, 8)
    with PackWriter(tmp_path / "train.npz") as writer:
        for i in range(5):
            writer.add(encode(source, i, 256, 90), i % 2)
    assert PackedSource(tmp_path / "train.npz").class_names == names
    for name in ("c\nd", "", "e\r", "caf\udce9"):
        with pytest.raises(ValueError, match="rename it"):
            write_classes(tmp_path, ["a", name])


def test_classes_txt_saved_by_text_editors(pack):
    names = pack.parent / "classes.txt"
    for text in (b"\xef\xbb\xbfeven\nodd\n", b"even\r\nodd\r\n", b"even\nodd"):
        names.write_bytes(text)
        assert PackedSource(pack).class_names == ["even", "odd"]
    for text, words in (
        (b"even\n\xe9\n", "not UTF-8 .byte 0xe9"),
        ("even\nodd\n".encode("utf-16"), "not UTF-8 but UTF-16"),
    ):
        names.write_bytes(text)
        with pytest.raises(ValueError, match=f"classes.txt: {words}"):
            PackedSource(pack)


def test_a_pack_lists_its_splits(pack):
    for split in ("val", "test"):
        (pack.parent / f"{split}.npz").write_bytes(pack.read_bytes())
    images = open_pack(pack.parent)
    assert images.val is None and len(images.test) == 5  # as in a pack of an older version
    for splits in (["train"], ["train", "val"], ["train", "val", "test"]):
        write_splits(pack.parent, splits)
        images = open_pack(pack.parent)
        assert [split for split in ("train", "val", "test") if getattr(images, split) is not None] == splits
    (pack.parent / "val.npz").unlink()
    with pytest.raises(FileNotFoundError, match="val.npz"):
        open_pack(pack.parent)
    write_splits(pack.parent, ["test"])
    with pytest.raises(ValueError, match="splits.txt"):
        open_pack(pack.parent)


def member(name: str, header: bytes | dict, content: bytes = b"") -> tuple[str, bytes]:
    """Return a member of a pack with the given NumPy header."""
    if isinstance(header, dict):
        header = str({"descr": "<i8", "fortran_order": False} | header).encode()
    return f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def forge(pack: Path, *members: tuple[str, bytes], compressed: bool = False) -> None:
    """Replace members of a pack."""
    with zipfile.ZipFile(pack) as archive:
        kept = {info.filename: archive.read(info) for info in archive.infolist()} | dict(members)
    with zipfile.ZipFile(pack, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, content in kept.items():
            archive.writestr(name, content)


FORGED = {
    "8 TiB of labels": member("labels", {"shape": (2**40,)}),
    "8 TiB of images": member("jpeg", {"descr": "|u1", "shape": (2**43,)}),
    "a shape that wraps to its size": member("jpeg", {"descr": "|u1", "shape": (2**64 + 8,)}),
    "a negative shape": member("labels", {"shape": (-1,)}),
    "offsets that wrap": member(
        "offsets", {"shape": (6,)}, np.array([0, 2**63 - 1, -(2**63), 1, 2, 3], np.int64).tobytes()
    ),
    "a header of brackets": member("labels", b"(" * 200),
    "a header that is no literal": member("labels", b"{'descr': open('x'), 'fortran_order': False, 'shape': (5,)}"),
    "a header of nothing": member("labels", b""),
    "objects": member("jpeg", {"descr": "|O", "shape": (5,)}, b"\1" * 40),
    "strings": member("labels", {"descr": "<U5", "shape": (5,)}, b"\0" * 100),
    "version 9": ("labels.npy", b"\x93NUMPY\x09\x00"),
    "no NumPy": ("offsets.npy", b"nothing"),
}


@pytest.mark.parametrize("kind", FORGED)
@pytest.mark.parametrize("compressed", [False, True])
def test_forged_members_are_refused_before_memory_is_allocated(kind, compressed, pack):
    forge(pack, FORGED[kind], compressed=compressed)
    with pytest.raises(ValueError) as refusal:
        PackedSource(pack)
    assert str(pack) in str(refusal.value)


def test_a_member_that_unpacks_to_too_many_bytes_is_refused(pack, monkeypatch):
    monkeypatch.setattr("moe_bsr.data.packed.UNPACKED", 1000)
    forge(pack, member("jpeg", {"descr": "|u1", "shape": (2**20,)}, bytes(2**20)), compressed=True)
    with pytest.raises(ValueError, match=r"would take \d+ bytes, unpacked from"):
        PackedSource(pack)


@pytest.mark.parametrize("field, value", [(6, 1), (8, 99)])
def test_encrypted_members_and_unknown_compressions_are_refused(field, value, pack):
    content = bytearray(pack.read_bytes())
    start = content.find(b"PK\x01\x02")
    while start >= 0:
        content[start + field + 2] = value  # the flags or the compression method in the central directory
        start = content.find(b"PK\x01\x02", start + 1)
    pack.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable pack"):
        PackedSource(pack)


def test_a_fifo_is_refused(pack):
    pack.unlink()
    os.mkfifo(pack)
    with pytest.raises(FileNotFoundError, match="no such pack"):
        PackedSource(pack)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_packs_written_by_numpy(save, pack):
    plain = PackedSource(pack)
    with np.load(pack) as members:
        save(pack.parent / "test.npz", **members)
    other = PackedSource(pack.parent / "test.npz")
    assert isinstance(other.jpeg, np.memmap) == (save is np.savez)
    for i in range(5):
        np.testing.assert_array_equal(other.image(i), plain.image(i))


def change(name: str, value):
    def damage(members: dict) -> None:
        members[name] = value(members[name])

    return damage


@pytest.mark.parametrize(
    "damage, word",
    [
        (change("offsets", lambda o: o[:-1]), "5 offsets for 5 labels"),
        (change("offsets", lambda o: o[[0, 2, 1, 3, 4, 5]]), "do not rise at image 1"),
        (change("offsets", lambda o: o + 10**6), "outside the data"),
        (change("jpeg", lambda j: j[:-10]), "cut off"),
        (change("labels", lambda v: v + 1), "from 1 to 2, but classes.txt names 2"),
        (change("labels", lambda v: v - 1), "from -1"),
        (change("labels", lambda v: v.astype(np.int32)), "labels is int32"),
        (change("labels", lambda v: v.astype(object)), "allow_pickle"),
        (change("jpeg", lambda j: j[None]), "expected uint8 in one dimension"),
        (lambda members: members.pop("labels"), "no member 'labels'"),
    ],
)
def test_damage_is_refused_with_file_and_defect(damage, word, pack):
    with np.load(pack) as archive:
        members = dict(archive)
    damage(members)
    np.savez(pack, **members)
    with pytest.raises(ValueError, match=word) as refusal:
        PackedSource(pack)
    assert str(pack) in str(refusal.value)


def test_truncated_or_foreign_files_are_refused(pack):
    content = pack.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a zip file", content[:-30]):
        pack.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable pack"):
            PackedSource(pack)


def test_compressed_pack_with_a_flipped_byte_is_refused(pack):
    with np.load(pack) as members:
        np.savez_compressed(pack, **dict(members))
    with zipfile.ZipFile(pack) as archive:
        middle = archive.getinfo("jpeg.npy").compress_size // 2
    content = bytearray(pack.read_bytes())
    content[middle] ^= 255
    pack.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable pack"):
        PackedSource(pack)


def test_damaged_image_inside_a_pack_is_named(tmp_path):
    write_classes(tmp_path, ["a"])
    with PackWriter(tmp_path / "train.npz") as writer:
        writer.add(b"nothing", 0)
    with pytest.raises(ValueError, match=r"image 0 of .*train\.npz"):
        PackedSource(tmp_path / "train.npz").image(0)


@pytest.mark.parametrize("names", ["", "a\n\nb\n", "a\na\n"])
def test_class_names_are_checked(names, pack):
    (pack.parent / "classes.txt").write_text(names)
    with pytest.raises(ValueError, match="classes.txt"):
        PackedSource(pack)


def test_interrupted_writing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), PackWriter(tmp_path / "train.npz") as writer:
        writer.add(b"x", 0)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_packed_task(tmp_path, pack):
    write_pack(tmp_path / "pixels", Pixels(40, 8))
    (tmp_path / "pixels/test.npz").write_bytes(pack.read_bytes())
    file = tmp_path / "other.yaml"
    file.write_text("title: Other\nsource: packed\npath: pixels\n")
    data = load_task(load_spec(file), root=tmp_path)
    assert (len(data.train) + len(data.val), len(data.test)) == (40, 40)
    (tmp_path / "pixels/test.npz").unlink()
    with pytest.raises(FileNotFoundError, match="test.npz"):
        load_task(load_spec(file), root=tmp_path)


@pytest.mark.skipif("MOE_BSR_DATA" not in os.environ, reason="MOE_BSR_DATA is not set to packs")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102", "pets", "food101"])
def test_real_packs_open_and_decode(name):
    data = load_task(load_spec(name), root=Path(os.environ["MOE_BSR_DATA"]))
    assert "pack" in data.origin
    for split in (data.train, data.val, data.test):
        image = split.source.image(int(split.index[-1]))
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert set(data.val.labels) == set(range(len(data.class_names)))
