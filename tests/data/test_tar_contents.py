"""Test what tar shards contain: labels of every kind, unused and damaged members, and patterns of shard names."""

import gzip
import json

import pytest
from tiny_data import encoded
from tiny_shards import write_shard

from moe_bsr.data.sources.tar import TarTask, expanded


def task(train: str | list[str], **keys) -> TarTask:
    return TarTask(name="pictures", title="Pictures", train=train, **keys)


def damaged(content: bytes) -> dict[str, tuple[bytes, str]]:
    middle = content[:2048] + b"x" * 512 + content[2560:]
    return {
        "cut in a member": (content[:1800], "cut off: it ends after 1800 bytes"),
        "cut in a header": (content[:2200], "damaged: no header at byte 2048|cut off"),
        "another header": (middle, "damaged: no header at byte 2048"),
        "compressed": (gzip.compress(content), "the tar file is compressed"),
        "no tar": (b"<html>" + bytes(600), "not a tar file"),
        "empty": (b"", "not a tar file"),
    }


@pytest.mark.parametrize("how", damaged(b"").keys())
def test_a_damaged_shard_is_refused_by_name(how, tmp_path):
    members = [(f"{n}.{end}", content) for n in range(3) for end, content in (("png", encoded(n)), ("cls", b"0"))]
    file = write_shard(tmp_path / "a.tar", members)
    content, words = damaged(file.read_bytes())[how]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.tar: ({words})") as caught:
        task("a.tar").open(tmp_path)
    assert "\n" not in str(caught.value)


def opened(tmp_path, members, **keys):
    write_shard(tmp_path / "a.tar", members)
    return task("a.tar", **keys).open(tmp_path)


IMAGES = [(f"{n}.png", encoded(n)) for n in range(4)]


@pytest.mark.parametrize(
    ("labels", "keys", "classes", "expected"),
    [
        ([(f"{n}.cls", text) for n, text in enumerate((b"10", b"2", b"2\n", b"10"))], {}, ["2", "10"], [1, 0, 0, 1]),
        ([(f"{n}.cls", b"%d" % (n % 2)) for n in range(4)], {"class_names": ["bee", "ant", "cat"]},
         ["bee", "ant", "cat"], [0, 1, 0, 1]),
        ([(f"{n}.txt", b"ab"[n % 2 : n % 2 + 1]) for n in range(4)], {"class_names": ["b", "a"]}, ["b", "a"],
         [1, 0, 1, 0]),
        ([(f"{n}.json", json.dumps({"id": n, "label": "xy"[n // 2]}).encode()) for n in range(4)], {}, ["x", "y"],
         [0, 0, 1, 1]),
        ([(f"{n}.json", json.dumps({"label": 0, "kind": n % 2}).encode()) for n in range(4)],
         {"label_column": "json.kind"}, ["0", "1"], [0, 1, 0, 1]),
        ([(f"{n}.CLS", b"%d" % n) for n in range(4)] + [(f"{n}.txt", b"a caption") for n in range(4)], {},
         ["0", "1", "2", "3"], [0, 1, 2, 3]),
        ([(f"{n}.Class.TXT", b"%d" % (n % 2)) for n in range(4)], {"label_column": ".Class.txt"}, ["0", "1"],
         [0, 1, 0, 1]),
        ([(f"{n}.json", json.dumps({"Kind": n % 2}).encode()) for n in range(4)], {"label_column": ".JSON.Kind"},
         ["0", "1"], [0, 1, 0, 1]),
    ],
)  # fmt: skip
def test_labels(labels, keys, classes, expected, tmp_path):
    images = opened(tmp_path, IMAGES + labels, **keys)
    assert images.train.class_names == classes and images.train.labels.tolist() == expected and not images.unused


def test_the_folder_is_the_label_if_there_is_no_other(tmp_path):
    images = opened(tmp_path, [(f"./train/{'ab'[n % 2]}/{n}.png", encoded(n)) for n in range(4)])
    assert images.train.class_names == ["a", "b"] and images.train.names[0] == "train/a/0.png"


def test_all_unused_members_are_reported(tmp_path):
    labels = [(f"{n}.cls", text) for n, text in enumerate((b"0", b"1", b"-1"))]
    others = [
        ("0.jpg", encoded(9)), ("1.seg.png", encoded(9)), ("2.npy", b"-"), ("._0.png", b"-"), ("3.txt", b"-"),
        ("9.cls", b"1"), ("__MACOSX/x.png", b"-"),
    ]  # fmt: skip
    unused = opened(tmp_path, IMAGES + labels + others).unused
    assert sorted(line.removeprefix("not used: ").partition(",")[0] for line in unused) == [
        "1 .npy file", "1 image with dots in its ending", "1 label without an image",
        "1 second image of a sample", "2 images without a label",
    ]  # fmt: skip


def test_names_are_made_distinct_and_a_missing_end_mark_is_reported(tmp_path):
    for shard in "ab":
        file = write_shard(tmp_path / f"{shard}.tar", [("x/0.png", encoded(0)), ("y/1.png", encoded(1))])
    file.write_bytes(
        file.read_bytes()[: 2 * 512 + 2 * 1024 * (1 + len(encoded(0)) // 1024)].rstrip(b"\0").ljust(2048, b"\0")
    )
    images = task(["{a,b}.tar"]).open(tmp_path)
    assert images.train.names == ["x/0.png", "y/1.png", "b.tar/x/0.png", "b.tar/y/1.png"]
    assert "1 tar file without an end mark" in images.unused[0]


@pytest.mark.parametrize(
    ("labels", "keys", "said"),
    [
        ([], {}, "no images with labels; found: 4 images without a label"),
        ([("0.cls", b"7")], {"class_names": ["a", "b"]}, "a label 7, but class_names has 2 names: 0 to 1"),
        ([("0.cls", b"x")], {"class_names": ["a", "b"]}, "class 'x' is not among the 2 classes"),
    ],
)
def test_missing_or_invalid_labels_are_refused(labels, keys, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        opened(tmp_path, IMAGES + labels, **keys)


def test_shards_that_label_in_two_ways_are_refused(tmp_path):
    write_shard(tmp_path / "a.tar", [*IMAGES, ("0.cls", b"0")])
    write_shard(tmp_path / "b.tar", [*IMAGES, ("0.txt", b"0")])
    with pytest.raises(ValueError, match=r"labels in different places: cls \(.*a.tar\) and txt \(.*b.tar\)"):
        task("{a,b}.tar").open(tmp_path)


def test_patterns():
    assert expanded("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expanded("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    for wrong in ("{3..1}", "{a}", "{0..999999999999}", "{0..999}{0..999}"):
        with pytest.raises(ValueError, match="shards|neither a range"):
            expanded(wrong)
