"""Test that images in tar shards equal those in a folder, from local files, servers, fsspec and the Hub."""

import shutil
import warnings

import numpy as np
import pytest
from tiny_data import encoded, folder_task
from tiny_shards import served, shards_of, write_shard
from tiny_tasks import TRANSFORMS

from moe_bsr.data import Loader, LostData, UnreadableImage, addresses, fetching, load_task
from moe_bsr.data.check import check_task
from moe_bsr.data.sources.folder import FolderTask
from moe_bsr.data.sources.tar import TarTask
from moe_bsr.data.spec import spec_from
from moe_bsr.runs import data_record


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
        server.credentials.clear()


def task(train="shards/train-{000..004}.tar", **keys) -> TarTask:
    return TarTask(name="pictures", title="Pictures", train=train, **keys)


def pixels_of(source) -> list[bytes]:
    return [source.image(i).tobytes() for i in range(len(source))]


@pytest.mark.parametrize("where", ["local", "star", "ranges", "no ranges", "moved", "fsspec"])
def test_shards_give_the_same_data_as_the_folder(where, root, server, tmp_path):
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
    assert len(server.asked) == 2 * 5  # one for the file's identity, one for its headers
    first.expect(range(len(first)))
    before = pixels_of(first)
    assert len(server.asked) == 2 * 5 + 30
    assert pixels_of(first) == before and len(server.asked) == 2 * 5 + 30
    again = spec.open(root).train
    assert pixels_of(again) == before and len(server.asked) == 2 * 5 + 30 + 5


def test_a_damaged_cache_is_not_trusted(root, server, tmp_path):
    spec = task(f"{server.url}/shards/train-000.tar", cache=str(tmp_path))
    before = pixels_of(spec.open(root).train)
    for kept in tmp_path.glob("*.bytes"):
        kept.write_bytes(bytes(kept.stat().st_size))
    for index in tmp_path.glob("*.json.gz"):
        index.write_bytes(index.read_bytes()[:-9])
    assert pixels_of(spec.open(root).train) == before


def test_the_cache_stays_within_cache_gb(root, server, tmp_path):
    source = task(f"{server.url}/shards/train-{{000..004}}.tar", cache=str(tmp_path), cache_gb=30e-6).open(root).train
    before = pixels_of(source)
    kept = sum(file.stat().st_blocks * 512 for file in tmp_path.glob("*.bytes"))
    count = len(server.asked)
    assert pixels_of(source) == before
    assert 0 < kept < 60_000 and 0 < len(server.asked) - count < 30  # file systems allocate blocks of 4 kB


def test_prefetched_bytes_are_bounded(root, server, tmp_path, monkeypatch):
    source = task(f"{server.url}/shards/train-{{000..004}}.tar", cache=str(tmp_path), cache_gb=0).open(root).train
    monkeypatch.setattr(fetching, "AHEAD_BYTES", 5 * int(source.sizes.max()))
    source.expect(range(len(source)))
    assert len(source._ahead._coming) <= 6
    assert pixels_of(source) == pixels_of(FolderTask(name="p", title="", path="pictures").open(root).train)
    assert not source._ahead._coming and source._ahead._bytes == 0


def test_a_loader_prefetches_the_images_of_its_plan(root, server, tmp_path):
    data = load_task(task(f"{server.url}/shards/train-{{000..004}}.tar", cache=str(tmp_path)), root=root)
    plan = [("pictures", np.arange(start, start + 4), np.zeros(4, np.int64)) for start in range(0, 20, 4)]
    batches = iter(Loader({"pictures": data}, TRANSFORMS, plan))
    first = next(batches)
    for future in list(data.train.source._ahead._coming.values()):
        future.result()
    server.alive = False  # all images have been fetched: the loader looks 256 images ahead
    rest = list(batches)
    assert [batch.positions.tolist() for batch in (first, *rest)] == [positions.tolist() for _, positions, _ in plan]


def test_requests_are_retried_a_limited_number_of_times(root, server, tmp_path):
    source = task(f"{server.url}/shards/train-000.tar", cache=str(tmp_path)).open(root).train
    server.busy = 2
    source.image(0)
    server.alive = False
    with pytest.raises(LostData, match=r"^http://127.*/shards/train-000\.tar: .*, tried 5 times$"):
        source.image(1)
    with pytest.raises(LostData, match="train-001.tar: .*, tried 5 times"):
        task(f"{server.url}/shards/train-001.tar", cache=str(tmp_path)).open(root)


def test_a_server_that_stops_sending_byte_ranges_is_refused(root, server, tmp_path):
    source = task(f"{server.url}/shards/train-000.tar", cache=str(tmp_path)).open(root).train
    server.ranges = False
    with pytest.raises(LostData, match="does not send byte ranges any more, tried 5 times"):
        source.image(0)


def test_whole_shards_that_exceed_cache_gb_are_refused(root, server, tmp_path):
    server.ranges = False
    with pytest.raises(
        ValueError, match=r"does not support byte ranges, so whole shards are kept, and 5 of .*raise cache_gb"
    ):
        task(f"{server.url}/shards/train-{{000..004}}.tar", cache=str(tmp_path), cache_gb=1e-5).open(root)
    assert server.sent < 10**6 and not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize("far", [False, True])
def test_a_changed_shard_is_detected_and_indexed_again(far, root, server, tmp_path):
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


def test_an_unreadable_member_is_named_with_its_shard(root, tmp_path):
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


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("none-{0..3}.tar", "none-0.tar: no such file"), ("none*.tar", "no such shards"), ("x://a.tar", "x://a.tar: "),
        ("hf://models/a/b", "expected hf://datasets"), ("http://me:secret@host/a.tar", "user name or password"),
        (["a.tar", "a.tar"], "listed twice"), ([], "a list without shards"),
    ],
)  # fmt: skip
def test_invalid_addresses_are_refused(train, said, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        task(train).open(tmp_path)


def test_a_shard_of_the_hub_is_resolved_to_its_url(root, server, monkeypatch, tmp_path):
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
    source.image(0)
    assert server.credentials == {"Bearer secret"}
    server.credentials.clear()
    task(f"{server.url}/shards/train-000.tar", cache=str(tmp_path / "plain")).open(root).train.image(0)
    assert server.credentials == {None}


def test_a_full_disk_stops_only_the_caching(root, server, tmp_path, monkeypatch):
    source = task(f"{server.url}/shards/train-000.tar", cache=str(tmp_path)).open(root).train

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(pixels_of(source)) == 7
    assert len(caught) == 1 and "no more images are kept: No space left" in str(caught[0].message)


def test_a_run_follows_its_images_when_they_move_from_files_to_a_server(root, server, tmp_path):
    here = load_task(task(cache=str(tmp_path / "a")), root=root)
    there = load_task(task(f"{server.url}/shards/train-{{000..004}}.tar", cache=str(tmp_path / "b")), root=root)
    about = data_record.write(tmp_path, here)
    data_record.check_spec(tmp_path, there.spec, about)
    _, changes = data_record.follow(tmp_path, there, about)
    assert not any(changes.values())
    assert spec_from("pictures", about["spec"]) == here.spec
