"""The state of a run is saved and restored completely, and scores of lost weights are not reported."""

import json
import os
import signal

import pytest
import torch
from tiny_runs import LATE, act_at, make_config, make_trainer, script_scores, state_of

from moe_bsr.api import train
from moe_bsr.cli.main import main
from moe_bsr.runs import checkpoint
from moe_bsr.training import trainer as trainer_module
from moe_bsr.training.callback import Callback, by_name

pytestmark = pytest.mark.usefixtures("bare")


class Counter(Callback):
    """Callback that counts updates."""

    def __init__(self, name: str = "") -> None:
        self.name, self.updates = name, 0

    def on_step(self, step) -> None:
        self.updates += 1

    def state(self) -> dict:
        return {"updates": self.updates}

    def restore(self, state: dict) -> None:
        self.updates = state.get("updates", 0)


def test_load_state_dict_restores_the_state(tmp_path):
    config = make_config(tmp_path, **LATE, train__ema_decay=0.7, train__evaluate_test=False)
    first = make_trainer(config, tmp_path / "first", [Counter()])
    first.fit()
    second = make_trainer(config, tmp_path / "second", [Counter()])
    second.state.load_state_dict(first.state.state_dict())
    for name, value in state_of(first.model).items():
        assert torch.equal(value, state_of(second.model)[name]), name
    ours, theirs = first.state.state_dict(), second.state.state_dict()
    assert ours["progress"] == theirs["progress"]
    assert ours["progress"]["callbacks"] == {"Counter": {"updates": 8}}
    for group in ("optimizer", "average"):
        assert ours[group].keys() == theirs[group].keys()
        assert all(torch.equal(value, theirs[group][name]) for name, value in ours[group].items())


def test_callbacks_are_restored_by_their_names(tmp_path):
    config = make_config(tmp_path, **LATE, train__evaluate_test=False)
    make_trainer(config, tmp_path / "run", [Counter("a"), Counter("b")]).fit()
    saved = json.loads((tmp_path / "run" / "checkpoint" / "8" / "state.json").read_text())["callbacks"]
    assert saved == {"a": {"updates": 8}, "b": {"updates": 8}}
    b, new = Counter("b"), Counter("new")
    make_trainer(config, tmp_path / "run", [new, b]).fit(resume=True)
    assert (b.updates, new.updates) == (8, 0)


def test_two_callbacks_with_the_same_name_are_refused(tmp_path):
    for pair in ([Counter(), Counter()], [Counter("x"), Counter("x")]):
        with pytest.raises(ValueError, match="callbacks: two are named '(Counter|x)'.*attribute `name`"):
            make_trainer(make_config(tmp_path), tmp_path / "run", pair)
    assert list(by_name([Counter(), Counter("x")])) == ["Counter", "x"]


@pytest.mark.parametrize("ema", [None, 0.5])
def test_scores_of_lost_weights_are_not_reported(tmp_path, monkeypatch, ema):
    """If the best checkpoint is damaged, the last weights are evaluated again, and the report says so."""
    scored = script_scores(monkeypatch, [30.0, 10.0, 20.0, 15.0, 17.0])
    config = make_config(tmp_path, **LATE, train__eval_every=2, train__evaluate_test=False, train__ema_decay=ema)
    trainer = make_trainer(config, tmp_path / "run")
    load_best = trainer.state.load_best

    def damage_first(folder):
        assert trainer.state.best.step == 2
        file = folder / "checkpoint" / "2" / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        load_best(folder)

    monkeypatch.setattr(trainer.state, "load_best", damage_first)
    with pytest.warns(UserWarning, match="last weights are reported instead of the best"):
        report = trainer.fit()
    assert (report["selected_step"], report["selected_mean_val_top1"]) == (8, None)
    assert report["mean_top1"] == 17.0 and len(scored) == 5
    lost = report["lost_best"]
    assert (lost["step"], lost["mean_top1"], lost["scores"]["shapes"]["top1"]) == (2, 30.0, 30.0)
    assert "checkpoint/2/weights.safetensors" in lost["reason"]
    assert all(task["scored_step"] == 8 for task in report["tasks"].values())
    text = (tmp_path / "run" / "report.md").read_text()
    assert "best evaluation was at step 2, mean validation top-1 30.00 % (shapes 30.0, fractals 30.0)" in text
    assert "Weights: those of step 8, the last" in text and "checkpoint/2/weights.safetensors" in text
    assert torch.equal(scored[-1][1], scored[-2][1])


def test_an_intact_best_checkpoint_is_not_evaluated_again(tmp_path, monkeypatch):
    scored = script_scores(monkeypatch, [30.0, 10.0, 20.0, 15.0])
    config = make_config(tmp_path, **LATE, train__eval_every=2, train__evaluate_test=False)
    report = train(config, tmp_path / "run", callbacks=[])
    assert (report["selected_step"], report["mean_top1"], len(scored)) == (2, 30.0, 4)
    assert report["lost_best"] is None and report["step"] == 8
    assert {task["scored_step"] for task in report["tasks"].values()} == {2}
    text = (tmp_path / "run" / "report.md").read_text()
    assert "Weights selected: those of step 2 of 8, for the highest mean validation top-1: 30.00 %." in text
    assert "Images seen, epochs and updates are counted up to step 8." in text
    best = checkpoint.read(tmp_path / "run" / "checkpoint" / "2")[0]["weights"]
    assert torch.equal(best["heads.shapes.weight"], scored[0][1])


def test_a_resumed_run_restores_the_scores_of_its_best_step(tmp_path, monkeypatch):
    """The checkpoint holds the scores: nothing is evaluated twice, even without the report."""
    scored = script_scores(monkeypatch, [30.0, 10.0, 20.0, 15.0])
    config = make_config(tmp_path, **LATE, train__eval_every=2, train__evaluate_test=False)
    first = train(config, tmp_path / "run", callbacks=[])
    (tmp_path / "run" / "report.json").unlink()
    again = train(config, tmp_path / "run", resume=True, callbacks=[])
    assert len(scored) == 4 and again["tasks"] == first["tasks"] and again["selected_step"] == 2


def test_a_test_evaluation_is_recorded_with_the_step_of_its_weights(tmp_path, monkeypatch):
    script_scores(monkeypatch, [30.0, 10.0, 20.0, 15.0])
    train(make_config(tmp_path, **LATE, train__eval_every=2), tmp_path / "run", callbacks=[])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if line.get("split") == "test"} == {2}


def test_each_model_of_a_series_has_its_own_step(tmp_path, monkeypatch):
    scores = iter([30.0, 10.0, 20.0, 40.0])
    evaluate = trainer_module.evaluate
    monkeypatch.setattr(trainer_module, "evaluate", lambda *a: evaluate(*a) | {"top1": next(scores)})
    config = make_config(tmp_path, mode="single_task", train__steps=2, train__eval_every=1, train__evaluate_test=False)
    report = train(config, tmp_path / "run", callbacks=[])
    assert report["selected_steps"] == {"shapes": 1, "fractals": 2} and report["steps"] == {"shapes": 2, "fractals": 2}
    text = (tmp_path / "run" / "report.md").read_text()
    assert "its own step: shapes 1, fractals 2." in text
    assert "Images seen, epochs and updates are counted up to step 2 (shapes), 2 (fractals)." in text


def test_a_series_stopped_before_any_evaluation_says_so_instead_of_none(tmp_path, monkeypatch, capsys):
    config = make_config(tmp_path, mode="single_task", train__steps=3, train__evaluate_test=False)
    act_at(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(config, tmp_path / "run", callbacks=[])["status"] == "interrupted"
    text = (tmp_path / "run" / "report.md").read_text()
    assert "shapes not evaluated yet" in text and "None" not in text
    assert main(["tasks", str(tmp_path / "run")]) == 0
    assert "None" not in capsys.readouterr().out
