"""Runs with Rep-Net blocks: bitwise equal resumed runs, loading, warm starts, and the plan table."""

import pytest
import torch
from tiny_runs import assert_resumed_is_whole, finished, make_config, state_of

import moe_bsr
from moe_bsr.model.summary import table
from moe_bsr.runs.warm_start import build_from

pytestmark = pytest.mark.usefixtures("bare")

BESIDE = {
    "adapter": [{"kind": "repnet", "blocks": [1, 4]}],
    "plan__train_blocks": [],
    "plan__moe_blocks": [],
    "train__evaluate_test": False,
    "train__steps": 5,
    "train__checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its configuration and trainer."""
    folder = tmp_path_factory.mktemp("repnet")
    config = make_config(folder, **BESIDE)
    return config, finished(config, folder / "run")


def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(whole, tmp_path, monkeypatch):
    assert_resumed_is_whole(monkeypatch, whole[1], tmp_path / "run")


def test_a_loaded_run_gives_the_same_logits_and_a_warm_start_copies_its_blocks(whole):
    config, trainer = whole
    images = torch.randn(3, 3, 32, 32)
    loaded = moe_bsr.load(trainer.folder, "last", device="cpu").models["shapes"]
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(images, "shapes").logits, trainer.model(images, "shapes").logits)
    classes = {name: data.class_names for name, data in trainer.tasks.items()}
    model, notes = build_from(str(trainer.folder), config, classes)
    assert any("adapters of blocks 1, 4" in line for line in notes)
    blocks = {name: value for name, value in state_of(model).items() if "beside_block" in name}
    state = moe_bsr.load(trainer.folder, device="cpu").models["shapes"].state_dict()  # the best checkpoint
    assert len(blocks) == 24 and all(torch.equal(value, state[name]) for name, value in blocks.items())
    assert float(blocks["vit.blocks.4.beside_block.mlp.fc2.weight"].abs().max()) > 0


def test_the_plan_table_includes_the_side_blocks(whole):
    lines = table(whole[1].model, whole[0])
    assert lines[2].count("yes") == 1 and "repnet(published=False)" in lines[2]  # on the path, its own weights frozen
    first, second = (int(line.split()[-1].strip("()").replace(",", "")) for line in lines[1:3])
    assert (first, second) == (0, sum(p.numel() for p in whole[1].model.adapter_parameters[1]))
