"""Training on shards from an HTTP server equals training on the same images in a folder, even if the server fails."""

import numpy as np
import pytest
from tiny_data import folder_task
from tiny_runs import LATE, act_at, make_config, make_trainer, state_of
from tiny_shards import served, shards_of

from moe_bsr import config as configuration
from moe_bsr.callbacks.jsonl import Jsonl
from moe_bsr.data import addresses
from moe_bsr.runtime.distributed import Alone
from moe_bsr.training.failures import TrainingFailed

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    folder_task(root, each=14)
    for split in ("train", "test"):
        shards_of(root / "pictures" / split, root / "shards" / split)
    return root


@pytest.fixture
def server(root, monkeypatch):
    monkeypatch.setattr(addresses, "WAIT", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    with served(root) as server:
        yield server


def far_config(root, server, folder, cache_gb=1):
    """Return a configuration of seven updates of eight images from the server; an epoch has 36 images."""
    folder.mkdir(exist_ok=True)
    (folder / "pictures.yaml").write_text(
        f"title: Pictures\nsource: tar\ntrain: {server.url}/shards/train-{{000..005}}.tar\n"
        f"test: {server.url}/shards/test-000.tar\ncache: {folder / 'cache'}\ncache_gb: {cache_gb}\n"
    )
    return config_of(root, folder / "pictures.yaml")


def config_of(root, file):
    folder = file.parent
    changes = {"train__steps": 7, "train__checkpoint_every": 3, "train__eval_every": 4, "data__image_cache_mb": 0}
    config = make_config(folder, **LATE, **changes)
    return configuration.replace(config, tasks=[str(file)], data__root=str(root))


def trained(config, folder):
    trainer = make_trainer(config, folder, [Jsonl(folder)])
    trainer.fit()
    return (folder / "metrics.jsonl").read_bytes(), state_of(trainer.model)


def assert_same(one, other):
    assert one[0] == other[0]
    assert all(np.array_equal(value, other[1][name]) for name, value in one[1].items())


@pytest.fixture(scope="module")
def from_folder(root, tmp_path_factory, bare):
    """The result of a run on the folder."""
    return trained(config_of(root, root / "pictures.yaml"), tmp_path_factory.mktemp("near"))


def test_a_run_from_the_server_equals_one_from_a_folder(root, server, from_folder, tmp_path):
    assert_same(trained(far_config(root, server, tmp_path / "far"), tmp_path / "run"), from_folder)


def test_a_server_failure_loses_no_update(root, server, from_folder, tmp_path, monkeypatch):
    """It fails in the middle of an epoch, with nothing prefetched. The run resumes once the server is back."""
    monkeypatch.setattr("moe_bsr.data.loader.AHEAD", 0)
    config = far_config(root, server, tmp_path / "far", cache_gb=0)

    def die():
        server.alive = False

    with monkeypatch.context() as patch:
        act_at(patch, 2, die)
        with pytest.raises(
            TrainingFailed, match=r"ended at step \d: http.*train-00\d\.tar: .*, tried 5 times; last good"
        ):
            make_trainer(config, tmp_path / "run", [Jsonl(tmp_path / "run")]).fit()
    server.alive = True
    trainer = make_trainer(config, tmp_path / "run", [Jsonl(tmp_path / "run")])
    trainer.fit(resume=True)
    found = (tmp_path / "run" / "metrics.jsonl").read_bytes(), state_of(trainer.model)
    assert_same(found, from_folder)


def test_ranks_read_disjoint_parts_of_one_order(root, server, tmp_path):
    config = configuration.replace(far_config(root, server, tmp_path / "far"), train__grad_accumulation_steps=2)
    whole = make_trainer(config, tmp_path / "run")
    expected = [batch.positions for batch in whole.batches()]
    shares = []
    for rank in range(2):
        trainer = make_trainer(config, tmp_path / "run")
        trainer.ranks = Alone()
        trainer.ranks.rank, trainer.ranks.world = rank, 2
        before = len(server.asked)
        batches = list(trainer.batches())
        names = {trainer.tasks["pictures"].train.index[i] for batch in batches for i in batch.positions}
        assert len(server.asked) - before <= len(names) + 12  # only its own images, and the listing of the shards
        shares.append([batch.positions for batch in batches])
    assert len(expected) == 7
    for both, first, second in zip(expected, *shares, strict=True):
        np.testing.assert_array_equal(np.concatenate([first, second]), both)
