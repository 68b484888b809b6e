"""Test moe-bsr gradients: the table, the JSON and error messages."""

import json

import pytest
from tiny_runs import make_config

from moe_bsr import config as configuration
from moe_bsr.cli.main import main


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(configuration.dump(make_config(tmp_path, storage="int8", moe__balance_loss="across_tasks")))
    return str(path)


def test_storages_are_compared_with_exact_on_the_same_batch(file, capsys):
    storages = ["recompute", "segments_int8", "{kind: back_razor, sparsity: 0.95}"]
    command = ["gradients", file, "--batch", "8", "--rounds", "1", "--storages", *storages]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    exact, same, near, far = result["storages"]
    assert result["task"] == "shapes" and result["batch"] == 8
    assert [row["storage"] for row in (exact, same, near)] == ["exact", "recompute", "segments_int8"]
    assert far["storage"] == "back_razor(sparsity=0.95, activations=fp16)"
    assert exact["error"] == same["error"] == 0
    assert 0 < near["error"] < 0.05 < 0.3 < far["error"] and far["cosine"] < 0.95 < near["cosine"] < 1
    assert exact["kept"] > far["kept"] > near["kept"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert f"{near['kept'] / 2**20:.3f}" in text and far["storage"] in text


@pytest.mark.parametrize("storage", ["recomptue", "{kind: back_razor, sparsity: 2}", "[", "3"])
def test_an_invalid_storage_is_refused_in_one_line(file, storage, capsys):
    assert main(["gradients", file, "--storages", storage]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
