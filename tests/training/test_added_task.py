"""A task added to a finished run, and a task removed: outputs of the other tasks stay bitwise equal."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TASK, Crash, act_at, crash, make_config

import moe_bsr
from moe_bsr.config import Config, ConfigError, dump, replace
from moe_bsr.runs import checkpoint, folder
from moe_bsr.runs.config_file import read_config
from moe_bsr.runs.finished import read_finished, write_run
from moe_bsr.runs.listing import tasks_of
from moe_bsr.training.added_task import added_task_config

pytestmark = pytest.mark.usefixtures("bare")

SHORT = {"train__steps": 2, "train__checkpoint_every": 2}
DENSE = {"plan__moe_blocks": []}
KINDS = {
    "moe": {"moe__balance_loss": "across_tasks", "runtime__precision": "bf16", "train__ema_decay": 0.5},
    "conditioned": {"moe__router": "task_conditioned"},
    "lora": DENSE | {"adapter": [{"kind": "lora", "blocks": [1, 3]}]},
}


def new_task(folder: Path) -> str:
    file = folder / "petals.yaml"
    file.write_text(TASK.format("petals", 24, 60))
    return str(file)


UPDATES = {"train__optimizer": "adamw", "train__steps": 3, "train__batch_size": 8, "train__lr": 1e-2}


def shortened(config: Config, **changes) -> Config:
    """Shorten the command's configuration: one penalty, or a few updates if each task trains its own routers."""
    if config.plan.moe_blocks and config.moe.router == "per_task":
        return replace(config, **UPDATES | {"data__feature_cache_mb": 64} | changes)
    return replace(config, train__penalty=1e-2, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function that makes (once) a run of two tasks and one with a third task, and returns both folders."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            before, after = folder / kind, folder / f"{kind}_petals"
            moe_bsr.train(make_config(folder, **SHORT, **KINDS[kind]), before, callbacks=[])
            moe_bsr.train(shortened(added_task_config(before, new_task(folder))), after, callbacks=[])
            made[kind] = before, after
        return made[kind]

    return make


@functools.cache
def logits(run: Path) -> dict[str, torch.Tensor]:
    """Return the logits of the same images by task, as the run computes them."""
    loaded, images = moe_bsr.load(run), torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), loaded.runtime.autocast():
        return {task: model(images, task).logits for task, model in loaded.models.items()}


@functools.cache
def weights_of(run: Path) -> dict[str, torch.Tensor]:
    tensors = checkpoint.read(checkpoint.latest(run))[0]
    return tensors["weights"] | tensors.get("average", {})


def test_the_head_is_solved_on_features_of_the_experts(runs, tmp_path):
    """This is the command's own configuration. The other tests with experts train by updates instead."""
    before = runs("moe")[0]
    config = replace(added_task_config(before, new_task(tmp_path)), train__penalty=1e-2)
    report = moe_bsr.train(config, tmp_path / "after", callbacks=[])
    assert config.train.optimizer == "lbfgs" and report["tasks"]["petals"]["n"] > 0
    expected, found = logits(before), logits(tmp_path / "after")
    assert all(torch.equal(found[task], expected[task]) for task in expected)


@pytest.mark.parametrize("change", [{"moe__gate": "image"}, {"plan__keep_rate": 0.7}, {"adapter": "adaptformer"}])
def test_a_change_of_the_model_is_refused_while_tasks_are_kept(runs, tmp_path, change):
    before = runs("moe")[0]
    config = replace(added_task_config(before, new_task(tmp_path)), **change)
    with pytest.raises(ConfigError, match=r"train.only = \['petals'\]: .*use its value"):
        moe_bsr.train(config, tmp_path / "after", callbacks=[])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_the_other_tasks_stay_bitwise_equal(runs, kind):
    before, after = map(logits, runs(kind))
    assert list(after) == ["shapes", "fractals", "petals"] and after["petals"].shape == (5, 24)
    for task in before:
        assert torch.equal(before[task], after[task])


@pytest.mark.parametrize("kind", ["moe", "lora"])
def test_only_weights_of_the_new_task_are_added(runs, kind):
    before, after = map(weights_of, runs(kind))
    new = {name for name in after if ".petals" in name}
    assert after.keys() - new == before.keys() and len(new) == (2 if kind == "lora" else 4)
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(value, after[name][:2] if name.startswith("balance.") else after[name])
    moments = load_file(checkpoint.latest(runs(kind)[1]) / "optimizer.safetensors")
    assert all(".petals" in name for name in moments)


def test_new_routers_start_at_the_mean_of_the_others_and_train(runs):
    before, after = map(weights_of, runs("moe"))
    mean = sum(before[f"vit.blocks.3.mlp.router.weight.{task}"] for task in ("shapes", "fractals")) / 2
    moved = (after["vit.blocks.3.mlp.router.weight.petals"] - mean).abs().max()
    # Three updates of AdamW move a weight by at most three learning rates. The routers differ by far more.
    assert 0 < moved <= 0.031 and (before["vit.blocks.3.mlp.router.weight.shapes"] - mean).abs().max() > 0.031


def test_a_task_conditioned_router_starts_the_new_task_at_the_mean_of_the_others(runs):
    before, after = map(weights_of, runs("conditioned"))
    name = "vit.blocks.5.mlp.router.embed.0.weight"
    assert torch.equal(after[name][:, :2], before[name]) and torch.equal(after[name][:, 2], before[name].mean(1))


def test_a_head_trained_alone_is_the_linear_probe_of_the_runs_features(runs):
    """The gradient is zero at the optimum of this convex problem."""
    _, after = runs("lora")
    loaded = moe_bsr.load(after)
    data, model = loaded.data("petals", "train"), loaded.models["petals"]
    images = torch.cat([images for images, _ in loaded.transforms.eval_batches(data, "train", 64)])
    with torch.no_grad():
        x = model.features(model.forward_features(loaded.transforms.normalize(images), "petals", upto=6)[0])
    labels, head = torch.from_numpy(data.train.labels), model.heads["petals"]
    mean, std = x.mean(0), x.std(0, correction=0)
    weight = (head.weight * std).detach().double().requires_grad_()
    bias = (head.bias + head.weight @ mean).detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(((x - mean) / std).double() @ weight.T + bias, labels)
    (loss + 1e-2 / 2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3


def test_report_and_evaluation_cover_all_tasks(runs):
    before, after = runs("moe")
    report, then = (json.loads((run / "report.json").read_text()) for run in (after, before))
    assert list(report["tasks"]) == ["shapes", "fractals", "petals"]
    for task in ("shapes", "fractals"):
        assert report["tasks"][task] == then["tasks"][task]
        assert (after / f"images/{task}.json.gz").exists() == (before / f"images/{task}.json.gz").exists()
    new = report["tasks"]["petals"]
    assert new["n"] == 24 and new["images"] == 24 and 0 <= new["val_top1"] <= 100
    assert report["mean_top1"] == pytest.approx(sum(t["top1"] for t in report["tasks"].values()) / 3)
    assert report["test_evaluations"] == then["test_evaluations"] + 1
    text = (after / "report.md").read_text()
    assert "| petals |" in text and f"The other tasks and their numbers are those of {before}" in text
    old, now = (moe_bsr.evaluate(run, "val", batch_size=8)["tasks"] for run in (before, after))
    for task in old:
        assert {k: v for k, v in old[task].items() if k != "images_per_second"} == {
            k: v for k, v in now[task].items() if k != "images_per_second"
        }
    assert now["petals"]["top1"] == new["val_top1"]
    listed = {task["name"]: task for task in tasks_of(after)}
    assert listed["petals"]["images"] == {"train": 51, "val": 9, "test": 24}
    assert listed["petals"]["added"] >= listed["shapes"]["added"] and listed["petals"]["test_top1"] == new["top1"]
    assert listed["shapes"] == tasks_of(before)[0] and len(listed["petals"]["data_sha256"]) == 64


def test_a_resume_needs_neither_the_source_run_nor_images_of_other_tasks(runs, tmp_path, monkeypatch):
    before, whole = runs("moe")
    source = shutil.copytree(before, tmp_path / "source")
    opened, load_task = [], folder.load_task
    monkeypatch.setattr(folder, "load_task", lambda spec, **rest: opened.append(spec.name) or load_task(spec, **rest))
    config = shortened(added_task_config(source, new_task(tmp_path)), train__checkpoint_every=1)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        act_at(patch, 2, crash)
        moe_bsr.train(config, tmp_path / "run", callbacks=[])
    shutil.rmtree(source)
    moe_bsr.train(config, tmp_path / "run", resume=True, callbacks=[])
    first, second = weights_of(whole), weights_of(tmp_path / "run")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert opened == ["petals", "petals"]


# --- one task removed ---


@pytest.mark.parametrize("kind", KINDS)
def test_adding_and_removing_a_task_restores_the_run(runs, tmp_path, kind):
    before, after = runs(kind)
    write_run(read_finished(after, ["petals"]), after, tmp_path / "run")
    first, second = weights_of(before), weights_of(tmp_path / "run")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    first, second = logits(before), logits(tmp_path / "run")
    assert first.keys() == second.keys() and all(torch.equal(first[task], second[task]) for task in first)


def test_removing_another_task_does_not_change_the_added_one(runs, tmp_path):
    _, after = runs("conditioned")
    write_run(read_finished(after, ["shapes"]), after, tmp_path / "run")
    first, second = logits(after), logits(tmp_path / "run")
    assert list(second) == ["fractals", "petals"] and all(torch.equal(first[task], second[task]) for task in second)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert list(report["tasks"]) == ["fractals", "petals"] and report["mean_top1"] is not None
    assert moe_bsr.evaluate(tmp_path / "run", "test")["test_evaluations"] == 3
    with pytest.raises(checkpoint.CheckpointError, match="start another run from its weights"):
        config = replace(read_config(tmp_path / "run")[0], train__steps=9)
        moe_bsr.train(config, tmp_path / "run", resume=True, callbacks=[])


# --- refusals ---


def test_invalid_additions_and_removals_are_refused(runs, tmp_path):
    before, after = runs("moe")
    with pytest.raises(ConfigError, match="has a task petals already"):
        added_task_config(after, new_task(tmp_path))
    series = tmp_path / "series"
    series.mkdir()
    (series / "config.yaml").write_text(dump(make_config(tmp_path, mode="single_task")))
    with pytest.raises(ConfigError, match="model of its own for each task"):
        added_task_config(series, new_task(tmp_path))
    with pytest.raises(ConfigError, match="name one of them, such as .*shapes"):
        read_finished(series)
    with pytest.raises(ConfigError, match="no task 'petals' in .*: it has shapes, fractals"):
        read_finished(before, ["petals"])
    with pytest.raises(ConfigError, match="shapes, fractals are all tasks of"):
        read_finished(before, ["shapes", "fractals"])
    with pytest.raises(ConfigError, match="exists already"):
        write_run(read_finished(before, ["shapes"]), before, before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train__only": ["shapes"]}, r"train.init_from = None: with train.only"),
        ({"train__only": ["birds"], "train__init_from": "x"}, r"train.only = \['birds'\]: one or more of the tasks"),
        ({"train__only": [], "train__init_from": "x"}, r"train.only = \[\]: one or more"),
        ({"train__only": ["shapes"], "train__init_from": "x", "mode": "single_task"}, "mode = 'single_task'"),
    ],
)
def test_only_names_tasks_and_needs_a_run(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **changes)


def test_a_kept_task_must_be_in_the_source_run(runs, tmp_path):
    before, _ = runs("moe")
    config = make_config(tmp_path, train__init_from=str(before))
    config = replace(config, tasks=[new_task(tmp_path), config.tasks[0]], train__only=["shapes"])
    with pytest.raises(ConfigError, match="petals would be kept as in .*, which has only shapes, fractals"):
        moe_bsr.train(config, tmp_path / "run", callbacks=[])
