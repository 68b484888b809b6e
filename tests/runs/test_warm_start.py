"""Test warm starts: matching weights are copied exactly, and experts start as copies of the trained FFN."""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import make_config, replace_task

import moe_bsr
from moe_bsr.config import ConfigError, replace
from moe_bsr.model.multitask import build
from moe_bsr.runs import folder as run
from moe_bsr.runs.warm_start import build_from

pytestmark = pytest.mark.usefixtures("bare")

CLASSES = {"shapes": [f"c{i}" for i in range(10)], "fractals": [f"c{i}" for i in range(12)]}
HEADS = {"plan__train_blocks": [], "plan__drop_blocks": [], "plan__moe_blocks": []}
DENSE = {"plan__moe_blocks": []}
LORA = DENSE | {"adapter": {"kind": "lora", "layers": ["attn.qkv", "mlp.fc1"], "blocks": [1, 3]}}
LORA["adapter"] = [LORA["adapter"]]
FACTORED = DENSE | {
    "adapter": [{"kind": "factored", "rank": 0.5, "layers": ["attn.proj", "mlp.fc1"], "blocks": [1, 3]}]
}
BESIDE = DENSE | {"adapter": {"kind": "adaptformer", "width": 4}}
SHORT = {"train__steps": 2, "train__evaluate_test": False, "train__lr": 0.03}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that trains a plan once, for two updates, and returns its configuration and folder."""
    made: dict[str, tuple] = {}
    folder = tmp_path_factory.mktemp("sources")

    def make(**changes):
        if (name := repr(changes)) not in made:
            config, target = make_config(folder, **SHORT, **changes), folder / f"run{len(made)}"
            moe_bsr.train(config, target, callbacks=[])
            if config.mode == "multitask":
                fresh = build(config, {task: len(names) for task, names in names_of(target).items()})
                assert not torch.allclose(logits(fresh), logits(loaded(target)), atol=1e-3), "training moves nothing"
            made[name] = config, target
        return made[name]

    return make


def names_of(source: Path) -> dict[str, list[str]]:
    return {task: about["classes"] for task, about in run.read_config(source)[1]["tasks"].items()}


def logits(model, task="shapes") -> torch.Tensor:
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images, task).logits


@functools.cache
def loaded(source: Path):
    return moe_bsr.load(source).models["shapes"]


def started(config, source: Path, classes=None):
    return build_from(str(source), config, classes or names_of(source))


# --- the same function ---


@pytest.mark.parametrize(
    "before, after, tolerance",
    [
        (HEADS, DENSE | {"plan__drop_blocks": []}, 1e-6),
        (DENSE, DENSE, 0),
        (DENSE, {}, 1e-5),
        (DENSE, {"moe__router": "task_conditioned"}, 1e-5),
        ({}, {}, 0),
        ({"moe__router": "task_conditioned"}, {"moe__router": "task_conditioned"}, 0),
        ({"train__ema_decay": 0.5}, {}, 0),
        (DENSE, DENSE | {"plan__train_blocks": [5]}, 1e-6),
        (LORA, LORA, 0),
        (BESIDE, BESIDE, 0),
        (LORA, DENSE, 1e-5),
        (LORA, {}, 1e-5),
        (DENSE, LORA, 1e-6),
        (FACTORED, FACTORED, 0),
        (FACTORED, DENSE, 1e-5),
        (FACTORED, {}, 1e-5),
        (DENSE | {"train__save": "all"}, DENSE, 0),
    ],
    ids=["heads to bsr", "dense", "dense to moe", "to other routers", "moe", "conditioned", "average", "other blocks"]
    + ["lora", "beside", "lora to dense", "lora to moe", "dense to lora"]
    + ["factored", "factored to dense", "factored to moe", "all saved"],
)
def test_a_warm_start_with_a_compatible_plan_computes_the_same_logits(trained, before, after, tolerance):
    _, source = trained(**before)
    model, _ = started(make_config(source.parent, **SHORT, **after), source)
    for task in CLASSES:
        torch.testing.assert_close(logits(model, task), logits(loaded(source), task), rtol=tolerance, atol=tolerance)


def test_heads_take_only_the_weights_of_features_that_both_read(trained):
    _, source = trained(**HEADS, plan__head_blocks=[2, 4])
    saved, width = loaded(source).heads["shapes"].weight, loaded(source).vit.embed_dim
    parts = {None: saved[:, :width], 2: saved[:, width : 2 * width], 4: saved[:, 2 * width :]}
    for blocks in ([], [4, 2], [0, 4], [1]):
        model, notes = started(make_config(source.parent, **DENSE, plan__head_blocks=blocks), source)
        expected = [parts.get(block, torch.zeros_like(parts[2])) for block in (None, *sorted(blocks))]
        assert torch.equal(model.heads["shapes"].weight, torch.cat(expected, 1)), blocks
        assert model.heads["shapes"].bias.equal(loaded(source).heads["shapes"].bias)
        new, left = sorted({*blocks} - {2, 4}), sorted({2, 4} - {*blocks})
        for kind, found in (("new", new), ("left", left)):
            words = f"heads' weights for class tokens of blocks {', '.join(map(str, found))}"
            assert any(line.startswith(kind) and words in line for line in notes) == bool(found)


def test_experts_start_as_copies_of_the_trained_ffn(trained):
    _, source = trained(**DENSE)
    model, notes = started(make_config(source.parent), source)
    ffn = loaded(source).vit.blocks[3].mlp
    for expert in model.vit.blocks[3].mlp.experts.fc1_weight:
        assert torch.equal(expert, ffn.fc1.weight)
    assert any("experts of blocks 3, 5, copies of the FFN, routers of blocks 3, 5" in line for line in notes)


def test_experts_that_do_not_fit_are_left_out_and_reported(trained):
    _, source = trained()
    model, notes = started(make_config(source.parent, moe__num_experts=8), source)
    assert "left: experts of blocks 3, 5" in notes and any("new: experts of blocks 3, 5" in line for line in notes)
    model, notes = started(make_config(source.parent, **DENSE), source)
    assert "left: experts of blocks 3, 5" in notes


# --- classes and tasks by name ---


@pytest.mark.parametrize("router", ["per_task", "task_conditioned"])
def test_tasks_and_classes_are_matched_by_name_and_the_rest_is_reported(trained, router):
    _, source = trained(moe__router=router)
    theirs, names = loaded(source), names_of(source)["shapes"]
    classes = {"novel": ["x", "y"], "shapes": ["brand new", *reversed(names[1:])]}
    config = make_config(source.parent, moe__router=router)
    config = replace(config, tasks=[str(source.parent / "novel.yaml"), config.tasks[0]])
    model, notes = started(config, source, classes)
    for row, name in enumerate(classes["shapes"][1:], 1):
        assert torch.equal(model.heads["shapes"].weight[row], theirs.heads["shapes"].weight[names.index(name)])
    kept = [classes["shapes"].index(name) for name in names[1:]]
    torch.testing.assert_close(logits(model)[:, kept], logits(theirs)[:, 1:], rtol=1e-5, atol=1e-5)
    text = "\n".join(notes)
    assert "head of shapes (9 of 10 classes)" in text and "classes of shapes (brand new)" in text
    assert "new: head of novel" in text and f"left: head of fractals, classes of shapes ({names[0]})" in text


def test_single_task_models_provide_all_heads_or_one_whole_model(trained):
    _, source = trained(mode="single_task", **DENSE)
    config = make_config(source.parent, **DENSE)
    classes = names_of(source / "shapes") | names_of(source / "fractals")
    model, notes = started(config, source, classes)
    theirs = moe_bsr.load(source).models
    for task in classes:
        assert torch.equal(model.heads[task].weight, theirs[task].heads[task].weight)
    assert not any("blocks 1" in line for line in notes)
    alone, _ = started(replace_task(config, config.tasks[0]), source, {"shapes": classes["shapes"]})
    assert torch.equal(logits(alone), logits(theirs["shapes"]))


# --- runs after a warm start ---


@pytest.mark.parametrize("adapter, base", [(None, ""), ("lora", ".base")])
def test_a_run_records_its_source_and_resumes_without_it(trained, tmp_path, adapter, base):
    """The run's checkpoints contain its frozen blocks too, because their weights differ from the backbone's file."""
    _, first = trained(**DENSE)
    source = shutil.copytree(first, tmp_path / "source")
    config = make_config(tmp_path, train__steps=3, train__checkpoint_every=1, train__init_from=str(source), **HEADS)
    config = replace(config, adapter=adapter)
    whole = moe_bsr.train(config, tmp_path / "whole", callbacks=[])
    record = run.read_config(tmp_path / "whole")[1]["init_from"]
    assert record["run"] == str(source) and record["step"] == 2 and len(record["sha256"]) == 64
    weights = moe_bsr.load(tmp_path / "whole").models["shapes"].state_dict()
    assert torch.equal(
        weights[f"vit.blocks.1.attn.qkv{base}.weight"],
        moe_bsr.load(source).models["shapes"].vit.blocks[1].attn.qkv.weight,
    )
    shutil.rmtree(source)
    stopped = shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (stopped / "report.json").unlink()
    shutil.rmtree(stopped / "checkpoint" / "3")
    again = moe_bsr.train(config, stopped, resume=True, callbacks=[])
    assert again["mean_top1"] == whole["mean_top1"]
    resumed = moe_bsr.load(stopped).models["shapes"].state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
    assert (stopped / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert run.read_config(stopped)[1]["init_from"] == record


def test_fixed_gates_come_from_the_configuration_and_not_from_the_source(trained):
    low_rank = {"moe__experts": "low_rank", "moe__rank": 2}
    config, source = trained(**low_rank, moe__gate="constant")
    model, notes = started(replace(config, moe__gate="task"), source)
    for task, gates in {"shapes": [0.5, 0.5, 0, 0], "fractals": [0, 0, 0.5, 0.5]}.items():
        assert model.vit.blocks[3].mlp.router.weight[task].tolist() == gates
    assert "experts of blocks 3, 5" in notes[1] and "routers" not in notes[1]


@pytest.mark.parametrize("case", ["missing", "no run", "another backbone", "another depth"])
def test_an_invalid_source_is_refused_with_its_key(trained, tmp_path, case):
    _, source = trained(**DENSE)
    config = make_config(
        tmp_path, train__init_from=str({"missing": tmp_path / "gone", "no run": tmp_path}.get(case, source))
    )
    if case == "another backbone":
        config = replace(config, seed=5)  # other random weights
    if case == "another depth":
        config = replace(config, backbone={"name": "vit_pico_patch8_64"}, adapter="lora", **DENSE)
    with pytest.raises(ConfigError, match=r"train\.init_from = .*(is not a run folder|of one backbone)"):
        moe_bsr.train(config, tmp_path / "run", callbacks=[])
    assert not (tmp_path / "run" / "checkpoint").exists()
