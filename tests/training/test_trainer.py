"""The trainer: which parameters move, gradients by definition, the weights that are scored, divergence."""

import copy
import json

import pytest
import torch
from tiny_runs import make_config, make_trainer, script_scores, state_of, watch

from moe_bsr.api import train
from moe_bsr.callbacks.jsonl import Jsonl
from moe_bsr.runs import checkpoint
from moe_bsr.training.trainer import NonFiniteLoss

pytestmark = pytest.mark.usefixtures("bare")

PLAIN_SGD = {
    "train__optimizer": "sgd",
    "train__momentum": 0.0,
    "train__weight_decay": 0.0,
    "train__warmup_steps": 0,
    "train__grad_clip_norm": None,
    "train__evaluate_test": False,
}


def of_task(name: str, task: str) -> bool:
    return f"heads.{task}." in name or name.endswith(f"router.weight.{task}")


# --- which parameters move ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__optimizer": "sgd"},
        {"plan__train_blocks": [], "plan__moe_blocks": []},
        {"plan__train_blocks": "all"},
        {"moe__train_router": False},
        {"sampler__kind": "joint"},
    ],
    ids=["blocks", "sgd", "last layer", "all", "frozen routers", "joint"],
)
def test_only_trained_parameters_change(tmp_path, changes):
    config = make_config(tmp_path, train__steps=2, train__evaluate_test=False, **changes)  # one update of each task
    trainer, snapshots = watch(config, tmp_path / "run")
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    expected = {
        "": trained,
        "all": {n for n, _ in trainer.model.named_parameters()},
        "[]": {n for n in trained if n.startswith("heads.")},
    }
    assert trained == expected.get(str(config.plan.train_blocks), expected[""])
    trainer.fit()
    before, after = snapshots.states[0], state_of(trainer.model)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved - {"balance.importance", "balance.load"} == trained


@pytest.mark.parametrize(
    "changes",
    [
        {"train__optimizer": "sgd", "train__momentum": 0.9, "train__weight_decay": 0.1},
        {"train__optimizer": "adamw", "train__weight_decay": 0.1},
    ],
    ids=["momentum", "adamw"],
)
def test_head_and_routers_of_the_other_task_do_not_change(tmp_path, changes):
    """From the third update on, both tasks have moments that could move their parameters."""
    trainer, snapshots = watch(
        make_config(tmp_path, train__steps=4, train__evaluate_test=False, **changes), tmp_path / "run"
    )
    trainer.fit()
    assert snapshots.tasks == ["shapes", "fractals"] * 2
    for step, task in enumerate(snapshots.tasks):
        other = {"shapes": "fractals", "fractals": "shapes"}[task]
        before, after = snapshots.states[step], snapshots.states[step + 1]
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        own = {name for name in before if of_task(name, task)}
        assert len(own) == 2 + 2 and own <= moved
        assert not {name for name in moved if of_task(name, other)}


# --- the gradient ---


def loss_by_hand(model, trainer, weights: dict[str, float], smoothing: float) -> torch.Tensor:
    """Return sum(w_t * mean_t) / sum(w_t) over the batches of the first update."""
    total = 0.0
    batches = list(trainer.sampler.batches())[: len(trainer.sampler.tasks(0))]
    for task, positions, epochs in batches:
        images, labels = trainer.transforms.train_batch(trainer.tasks[task], positions, epochs)
        output = model(trainer.transforms.normalize(images), task)
        log_p = output.logits.log_softmax(1)
        nll = -log_p[torch.arange(len(labels)), labels].mean()
        total = total + weights[task] * ((1 - smoothing) * nll - smoothing * log_p.mean() + output.auxiliary_loss)
    return total / sum(weights.values())


@pytest.mark.parametrize(
    ("weights", "smoothing"), [({}, 0.0), ({"shapes": 3.0, "fractals": 0.5}, 0.2), ({"fractals": 4.0}, 0.0)]
)
def test_a_joint_update_follows_the_weighted_mean_of_the_tasks(tmp_path, weights, smoothing):
    config = make_config(
        tmp_path,
        sampler__kind="joint",
        train__steps=1,
        train__lr=1.0,
        **PLAIN_SGD,
        train__task_weights=weights,
        train__label_smoothing=smoothing,
    )
    trainer, snapshots = watch(config, tmp_path / "run")
    model = copy.deepcopy(trainer.model).train()
    loss_by_hand(model, trainer, {"shapes": 1.0, "fractals": 1.0} | weights, smoothing).backward()
    trainer.fit()
    before, after = snapshots.states[0], snapshots.states[-1]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(before[name] - after[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_task_weights_scale_updates_relative_to_their_mean(tmp_path):
    changes = []
    for weights in ({}, {"shapes": 3.0, "fractals": 1.0}, {"shapes": 1.0, "fractals": 3.0}):
        config = make_config(tmp_path, train__steps=1, train__lr=1.0, **PLAIN_SGD, train__task_weights=weights)
        trainer, snapshots = watch(config, tmp_path / str(len(changes)))
        trainer.fit()
        assert snapshots.tasks == ["shapes"]
        name = "vit.blocks.5.attn.proj.weight"
        changes.append(snapshots.states[1][name] - snapshots.states[0][name])
    torch.testing.assert_close(changes[1], 1.5 * changes[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(changes[2], 0.5 * changes[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["round_robin", "joint"])
def test_micro_batches_give_the_update_of_the_whole_batch(tmp_path, kind):
    ends = []
    for accumulate in (1, 2):
        config = make_config(
            tmp_path,
            sampler__kind=kind,
            train__steps=2,
            train__grad_accumulation_steps=accumulate,
            moe__balance_loss="none",
            **PLAIN_SGD | {"train__lr": 0.1, "train__momentum": 0.9},
        )
        trainer, snapshots = watch(config, tmp_path / str(accumulate))
        trainer.fit()
        ends.append(snapshots.states[-1])
        assert trainer.sampler.progress(2)["shapes"]["images"] == (8 if kind == "round_robin" else 16)
    for name, value in ends[0].items():
        if not name.startswith("balance."):
            torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ends[0]["heads.shapes.weight"], snapshots.states[0]["heads.shapes.weight"])


def test_gradients_are_clipped_and_the_norm_before_clipping_is_reported(tmp_path):
    settings = PLAIN_SGD | {"train__steps": 1, "train__lr": 1.0}
    lengths, norms = [], []
    for clip in (None, 0.25):
        folder = tmp_path / str(clip)
        config = make_config(tmp_path, **settings | {"train__grad_clip_norm": clip})
        trainer, snapshots = watch(config, folder, Jsonl(folder))
        trainer.fit()
        before, after = snapshots.states
        moved = [(after[name] - before[name]).norm() for name in before if not name.startswith("balance.")]
        lengths.append(float(torch.stack(moved).norm()))
        norms.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["gradient_norm"])
    assert norms[0] == norms[1] == pytest.approx(lengths[0], rel=1e-3)
    assert lengths[1] == pytest.approx(0.25, rel=1e-3)


# --- which weights are scored ---


@pytest.mark.parametrize("select, step, mean, ema", [("best", 2, 30.0, 0.5), ("last", 4, 25.0, None)])
def test_the_selected_weights_are_tested(tmp_path, monkeypatch, select, step, mean, ema):
    """Two evaluations tie at 30; the first of them counts."""
    scored = script_scores(monkeypatch, [10.0, 30.0, 30.0, 25.0])
    changes = {"train__checkpoint_selection": select, "train__ema_decay": ema}
    config = make_config(tmp_path, train__steps=4, train__eval_every=1, **changes)
    report = train(config, tmp_path / "run", callbacks=[])
    assert [split for split, _ in scored] == ["val"] * 4 + ["test"]
    assert torch.equal(scored[-1][1], scored[step - 1][1])
    assert not torch.equal(scored[1][1], scored[3][1])
    assert (report["selected_step"], report["selected_mean_val_top1"]) == (step, mean)
    assert report["mean_top1"] == 50.0 and report["weights"] == ("live" if ema is None else "average")
    assert checkpoint.steps(tmp_path / "run") == ([2, 3, 4] if select == "best" else [3, 4])


def test_the_moving_average_is_scored_and_the_live_weights_train_on(tmp_path, monkeypatch):
    scored = script_scores(monkeypatch, [10.0] * 4)
    timing = {"train__steps": 4, "train__eval_every": 3}
    config = make_config(tmp_path, train__ema_decay=0.8, train__checkpoint_selection="last", **timing)
    trainer, snapshots = watch(config, tmp_path / "run")
    trainer.fit()
    plain, live = watch(make_config(tmp_path, **timing), tmp_path / "plain")
    plain.fit()
    heads = [state["heads.shapes.weight"] for state in snapshots.states]
    assert all(torch.equal(a, b["heads.shapes.weight"]) for a, b in zip(heads, live.states, strict=True))
    averages = [heads[0]]
    for update, head in enumerate(heads[1:]):
        decay = min(0.8, (1 + update) / (10 + update))
        averages.append(decay * averages[-1] + (1 - decay) * head)
    for (_, head), step in zip(scored[:3], (3, 4, 4), strict=True):
        torch.testing.assert_close(head, averages[step])
    saved = checkpoint.read(tmp_path / "run" / "checkpoint" / "4")[0]
    assert torch.equal(saved["weights"]["heads.shapes.weight"], heads[-1])
    assert torch.equal(saved["average"]["heads.shapes.weight"], scored[1][1])


# --- a run that diverges ---


@pytest.mark.parametrize("kind", ["round_robin", "joint"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, kind):
    config = make_config(
        tmp_path,
        train__lr=1e30,
        train__weight_decay=0.0,
        train__grad_clip_norm=None,
        train__warmup_steps=0,
        sampler__kind=kind,
        train__checkpoint_every=1,
    )
    with pytest.raises(NonFiniteLoss) as error:
        train(config, tmp_path / "run", callbacks=[])
    message, saved = str(error.value), tmp_path / "run" / "checkpoint" / "1"
    assert "nan" in message or "inf" in message
    assert "at step 2," in message and str(saved) in message and "train.lr" in message
    assert f"task {'fractals' if kind == 'round_robin' else 'shapes'};" in message
    assert checkpoint.latest(tmp_path / "run") == saved


def test_a_run_that_diverges_at_once_reports_that_nothing_was_saved(tmp_path):
    trainer = make_trainer(make_config(tmp_path), tmp_path / "run")
    with torch.no_grad():
        trainer.model.heads["shapes"].bias.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="at step 1, task shapes; last good checkpoint: none"):
        trainer.fit()
    assert not checkpoint.steps(tmp_path / "run")
