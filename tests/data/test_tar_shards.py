"""Images in tar shards equal those in a folder, from every kind of address, and errors say what is wrong."""

import gzip
import json
import shutil
import warnings

import numpy as np
import pytest
from tiny_data import encoded, folder_task
from tiny_shards import served, shards_of, write_shard

from moe_bsr.data import ImageTransforms, Loader, LostData, UnreadableImage, addresses, fetching, load_task
from moe_bsr.data.check import check_task
from moe_bsr.data.sources.folder import FolderTask
from moe_bsr.data.sources.tar import TarTask, expanded
from moe_bsr.runs import data_record

TRANSFORMS = ImageTransforms(size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write folders of 30 and 6 images, and the same images as shards."""
    root = tmp_path_factory.mktemp("data")
    folder_task(root)
    for split in ("train", "test"):
        shards_of(root / "pictures" / split, root / "shards" / split)
    return root


@pytest.fixture(scope="module")
def server(root):
    with served(root) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch, request):
    monkeypatch.setattr(addresses, "WAIT", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        server.ranges, server.alive, server.asked, server.sent, server.busy = True, True, [], 0, 0


def task(train="shards/train-{000..004}.tar", **keys) -> TarTask:
    return TarTask(name="pictures", title="Pictures", train=train, **keys)


def pixels_of(source) -> list[bytes]:
    return [source.image(i).tobytes() for i in range(len(source))]


@pytest.mark.parametrize("where", ["local", "star", "ranges", "no ranges", "moved", "fsspec"])
def test_shards_hold_what_the_folder_holds(where, root, server, tmp_path):
    server.ranges = where != "no ranges"
    begin = {"local": "shards", "star": "shards", "moved": f"{server.url}/moved/shards"}.get(
        where, f"{server.url}/shards"
    )
    if where == "fsspec":
        fsspec = pytest.importorskip("fsspec")
        fsspec.filesystem("memory").put(str(root / "shards"), "/shards", recursive=True)
        begin = "memory://shards"
    numbers = ("*", "*") if where == "star" else ("{000..004}", "{000..000}")
    spec = task(f"{begin}/train-{numbers[0]}.tar", test=[f"{begin}/test-{numbers[1]}.tar"], cache=str(tmp_path))
    data = load_task(spec, root=root)
    folder = load_task(FolderTask(name="pictures", title="", path="pictures"), root=root)
    for split in ("train", "val", "test"):
        here, there = getattr(data, split), getattr(folder, split)
        assert here.source.names == there.source.names and here.source.class_names == there.source.class_names
        np.testing.assert_array_equal(here.index, there.index)
        np.testing.assert_array_equal(here.labels, there.labels)
        np.testing.assert_array_equal(here.source.sizes, there.source.sizes)
    assert pixels_of(data.train.source) == pixels_of(folder.train.source)
    assert data.train.source.encoded(3) == folder.train.source.encoded(3)
    assert data.notes == folder.notes and "5 (" in data.origin
    assert check_task(data) == check_task(folder) | {"origin": data.origin}


def test_index_and_images_are_fetched_once(root, server, tmp_path):
    spec = task(f"{server.url}/shards/train-{{000..004}}.tar", cache=str(tmp_path))
    first = spec.open(root).train
    assert len(server.asked) == 2 * 5  # the file's identity, and its headers
    first.expect(range(len(first)))
    before = pixels_of(first)
    assert len(server.asked) == 2 * 5 + 30
    assert pixels_of(first) == before and len(server.asked) == 2 * 5 + 30
    again = spec.open(root).train
    assert pixels_of(again) == before and len(server.asked) == 2 * 5 + 30 + 5


def test_a_cache_that_was_damaged_is_not_believed(root, server, tmp_path):
    spec = task(f"{server.url}/shards/train-000.tar", cache=str(tmp_path))
    before = pixels_of(spec.open(root).train)
    for kept in tmp_path.glob("*.bytes"):
        kept.write_bytes(bytes(kept.stat().st_size))
    for index in tmp_path.glob("*.json.gz"):
        index.write_bytes(index.read_bytes()[:-9])
    assert pixels_of(spec.open(root).train) == before


def test_no_more_is_kept_than_is_allowed(root, server, tmp_path):
    source = task(f"{server.url}/shards/train-{{000..004}}.tar", cache=str(tmp_path), cache_gb=30e-6).open(root).train
    before = pixels_of(source)
    kept = sum(file.stat().st_blocks * 512 for file in tmp_path.glob("*.bytes"))
    count = len(server.asked)
    assert pixels_of(source) == before
    assert 0 < kept < 60_000 and 0 < len(server.asked) - count < 30  # file systems keep blocks of 4 kB


def test_what_is_ahead_is_bounded(root, server, tmp_path, monkeypatch):
    source = task(f"{server.url}/shards/train-{{000..004}}.tar", cache=str(tmp_path), cache_gb=0).open(root).train
    monkeypatch.setattr(fetching, "AHEAD_BYTES", 5 * int(source.sizes.max()))
    source.expect(range(len(source)))
    assert len(source._ahead._coming) <= 6
    assert pixels_of(source) == pixels_of(FolderTask(name="p", title="", path="pictures").open(root).train)
    assert not source._ahead._coming and source._ahead._bytes == 0


def test_a_loader_tells_the_source_in_time(root, server, tmp_path):
    data = load_task(task(f"{server.url}/shards/train-{{000..004}}.tar", cache=str(tmp_path)), root=root)
    plan = [("pictures", np.arange(start, start + 4), np.zeros(4, np.int64)) for start in range(0, 20, 4)]
    batches = iter(Loader({"pictures": data}, TRANSFORMS, plan))
    first = next(batches)
    for future in list(data.train.source._ahead._coming.values()):
        future.result()
    server.alive = False  # all has been fetched: 256 images ahead
    rest = list(batches)
    assert [batch.positions.tolist() for batch in (first, *rest)] == [positions.tolist() for _, positions, _ in plan]


def test_a_server_that_is_busy_is_asked_again_and_a_dead_one_not_for_ever(root, server, tmp_path):
    source = task(f"{server.url}/shards/train-000.tar", cache=str(tmp_path)).open(root).train
    server.busy = 2
    source.image(0)
    server.alive = False
    with pytest.raises(LostData, match=r"^http://127.*/shards/train-000\.tar: .*, tried 5 times$"):
        source.image(1)
    with pytest.raises(LostData, match="train-001.tar: .*, tried 5 times"):
        task(f"{server.url}/shards/train-001.tar", cache=str(tmp_path)).open(root)


def test_a_server_that_sends_whole_files_in_place_of_ranges_is_refused(root, server, tmp_path):
    source = task(f"{server.url}/shards/train-000.tar", cache=str(tmp_path)).open(root).train
    server.ranges = False
    with pytest.raises(LostData, match="does not send byte ranges any more, tried 5 times"):
        source.image(0)


def test_whole_shards_need_room(root, server, tmp_path):
    server.ranges = False
    with pytest.raises(
        ValueError, match=r"does not support byte ranges, so whole shards are kept, and 5 of .*raise cache_gb"
    ):
        task(f"{server.url}/shards/train-{{000..004}}.tar", cache=str(tmp_path), cache_gb=1e-5).open(root)
    assert server.sent < 10**6 and not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize("far", [False, True])
def test_a_changed_shard_is_noticed_and_indexed_anew(far, root, server, tmp_path):
    shutil.copytree(root / "shards", root / "changing", dirs_exist_ok=True)
    begin = f"{server.url}/changing" if far else "changing"
    spec = task(f"{begin}/train-{{000..004}}.tar", cache=str(tmp_path))
    source = spec.open(root).train
    old = source.encoded(0)
    new = write_shard(root / "changing/train-000.tar", [
        member for n in range(3) for member in ((f"ant/new{n}.png", encoded(n + 90)), (f"ant/new{n}.cls", b"ant"))
    ])  # fmt: skip
    with pytest.raises(LostData, match=rf"train-000.tar: .* has changed .*, {new.stat().st_size} now.*start again"):
        source.image(1)
    again = spec.open(root).train
    assert again.names[:4] == ["ant/new0.png", "ant/new1.png", "ant/new2.png", "ant/7.png"]
    assert again.encoded(0) == encoded(90) != old
    assert len(list(tmp_path.glob("train_000*.json.gz")) + list(tmp_path.glob("train-000*.json.gz"))) == 1


def test_a_member_that_is_no_image_is_named_with_its_shard(root, tmp_path):
    members = [
        (f"{n}.{end}", content) for n in range(4) for end, content in (("jpg", encoded(n)), ("cls", b"%d" % (n % 2)))
    ]
    write_shard(
        tmp_path / "a.tar", [*members, ("4.jpg", b"no image"), ("4.cls", b"0"), ("5.jpg", b""), ("5.cls", b"1")]
    )
    source = task(str(tmp_path / "a.tar"), cache=str(tmp_path / "c")).open(root).train
    with pytest.raises(UnreadableImage, match=r"a\.tar: 4\.jpg: not a readable image"):
        source.image(4)
    with pytest.raises(UnreadableImage, match=r"5\.jpg.*it is empty"):
        source.image(5)


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
    content, said = damaged(file.read_bytes())[how]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.tar: ({said})") as caught:
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


def test_the_folder_is_the_label_where_there_is_no_other(tmp_path):
    images = opened(tmp_path, [(f"./train/{'ab'[n % 2]}/{n}.png", encoded(n)) for n in range(4)])
    assert images.train.class_names == ["a", "b"] and images.train.names[0] == "train/a/0.png"


def test_nothing_is_left_out_without_a_word(tmp_path):
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


def test_names_are_distinct_and_the_end_mark_is_missed(tmp_path):
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
def test_labels_that_cannot_be(labels, keys, said, tmp_path):
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


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("none-{0..3}.tar", "none-0.tar: no such file"), ("none*.tar", "no such shards"), ("x://a.tar", "x://a.tar: "),
        ("hf://models/a/b", "expected hf://datasets"), ("http://me:secret@host/a.tar", "user name or password"),
        (["a.tar", "a.tar"], "listed twice"), ([], "a list without shards"),
    ],
)  # fmt: skip
def test_addresses_that_cannot_be(train, said, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        task(train).open(tmp_path)


def test_a_file_of_the_hub_is_asked_for_with_the_token_that_is_logged_in(root, server, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_url",
        lambda repo, file, repo_type, revision: f"{server.url}/{repo_type}{revision}/{file}",
    )
    shutil.copytree(root / "shards", root / "datasetmain/shards")
    spec = task("hf://datasets/owner/name@main/shards/train-000.tar", cache=str(tmp_path))
    source = spec.open(root).train
    assert len(source) == 7 and source._shards[0].address == "hf://datasets/owner/name@main/shards/train-000.tar"


def test_a_disk_that_takes_no_more_stops_the_keeping_and_nothing_else(root, server, tmp_path, monkeypatch):
    source = task(f"{server.url}/shards/train-000.tar", cache=str(tmp_path)).open(root).train

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert len(pixels_of(source)) == 7
    assert len(told) == 1 and "no more images are kept: No space left" in str(told[0].message)


def test_a_run_follows_its_images_when_they_move_from_files_to_a_server(root, server, tmp_path):
    here = load_task(task(cache=str(tmp_path / "a")), root=root)
    there = load_task(task(f"{server.url}/shards/train-{{000..004}}.tar", cache=str(tmp_path / "b")), root=root)
    about = data_record.write(tmp_path, here)
    data_record.check_spec(tmp_path, there.spec, about)
    _, changes = data_record.follow(tmp_path, there, about)
    assert not any(changes.values())
    assert data_record.recorded_spec("pictures", about) == here.spec
