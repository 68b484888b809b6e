"""Curves, tables and pictures of a run's experts, read back from its event files."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tiny_routing import spread, to
from tiny_runs import TASKS, Crash, act_at, crash, make_config, make_trainer, state_of

from moe_bsr.api import train
from moe_bsr.callbacks import mistakes
from moe_bsr.callbacks import writer as writer_module
from moe_bsr.callbacks.expert_views import EXPERTS, PATCHES, ExpertViews, drawing_due
from moe_bsr.callbacks.tensorboard import TensorBoard
from moe_bsr.callbacks.writer import Writer
from moe_bsr.config import replace
from moe_bsr.evaluation import probe
from moe_bsr.model.block import Record
from moe_bsr.model.multitask import Output
from moe_bsr.training.callback import EvalEvent, StartEvent, StepEvent

pytestmark = pytest.mark.usefixtures("light")

MOE = {3, 5}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("tasks"), train__eval_every=4, train__evaluate_test=False)


@pytest.fixture(scope="module", autouse=True)
def no_mistakes():
    """Skip the pictures of mistakes, which take as long as the pictures tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mistakes.MistakeViews, "on_end", lambda self, report: None)
        yield


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(config, folder)
    return folder


def events(run) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


def curves(run) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Return the curves about experts by (sub-run, name)."""
    runs = EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory(str(run / "tensorboard")).Reload()
    return {
        (subrun, tag.removeprefix(f"{EXPERTS}/")): [(e.step, e.value) for e in runs.Scalars(subrun, tag)]
        for subrun, tags in runs.Runs().items()
        for tag in tags["scalars"]
        if tag.startswith(EXPERTS)
    }


def texts(run, tag: str) -> list[str]:
    return [e.tensor_proto.string_val[0].decode() for e in events(run).Tensors(f"{tag}/text_summary")]


def pictures(run) -> dict[str, list[tuple[int, bytes]]]:
    read = events(run)
    return {tag: [(e.step, e.encoded_image_string) for e in read.Images(tag)] for tag in read.Tags()["images"]}


class Recorded(ExpertViews):
    """Also records all routing, for slow reference counts afterwards."""

    def __init__(self, writer: Writer) -> None:
        super().__init__(writer)
        self.seen: list[tuple[int, str, dict, float]] = []

    def on_step(self, step: StepEvent) -> None:
        super().on_step(step)
        routing = {
            block: (r.experts.clone(), r.gates.detach().clone())
            for output in step.outputs
            for block, r in output.routing.items()
        }
        self.seen.append((step.step, step.task, routing, step.metrics["auxiliary_loss"]))


def test_curves_equal_slow_counts_over_each_window(config, tmp_path):
    writer = Writer(tmp_path / "tensorboard")
    recorder = Recorded(writer)
    report = make_trainer(replace(config, train__pictures=False), tmp_path, [recorder, TensorBoard(writer)]).fit()
    read = curves(tmp_path)
    for first, last in ((1, 4), (5, 8)):
        window = [entry for entry in recorder.seen if first <= entry[0] <= last]
        for block in MOE:
            counts = {task: np.zeros(4) for task in TASKS}
            for _, task, routing, _ in window:
                for expert in routing[block][0].flatten().tolist():
                    counts[task][expert] += 1
            load = sum(counts.values()) / sum(c.sum() for c in counts.values())
            found = {
                name: dict(read[f"block {block}", name])[last]
                for name in ("load_cv", "largest_share", "dead_experts", "mutual_information")
            }
            assert found["load_cv"] == pytest.approx(np.std(load) / np.mean(load), rel=1e-5)
            assert found["largest_share"] == pytest.approx(load.max(), rel=1e-5)
            assert found["dead_experts"] == (load < 0.01 / 4).sum()
            shares = [c / c.sum() for c in counts.values()]
            middle = sum(shares) / 2
            bits = sum(s * math.log2(s / m) / 2 for row in shares for s, m in zip(row, middle, strict=True) if s > 0)
            assert found["mutual_information"] == pytest.approx(bits, rel=1e-4, abs=1e-6)
        assert dict(read[".", "balance_loss"])[last] == pytest.approx(
            np.mean([auxiliary for *_, auxiliary in window]), rel=1e-5
        )
    for block in MOE:
        for task in TASKS:
            chosen = torch.cat([routing[block][0].flatten() for _, other, routing, _ in recorder.seen if other == task])
            share = torch.bincount(chosen, minlength=4) / len(chosen)
            assert report["expert_use"][str(block)][task] == pytest.approx(share.tolist(), abs=1e-4)


def test_a_run_has_its_pictures_and_tables(finished):
    found = {tag: drawn for tag, drawn in pictures(finished).items() if tag.startswith((EXPERTS, PATCHES))}
    names = {f"{EXPERTS}/{name}" for name in ("all blocks", *(f"block {block}" for block in MOE))}
    assert found.keys() == names | {f"{PATCHES}/{task}" for task in TASKS}
    for tag, drawn in found.items():
        assert [step for step, _ in drawn] == [4, 8], tag
        assert all(Image.open(io.BytesIO(png)).size[0] == 760 for _, png in drawn)
    tables = texts(finished, EXPERTS)
    assert "updates 1 to 4" in tables[0] and "updates 5 to 8" in tables[1]
    assert all(f"\n| {block} |" in tables[1] for block in MOE)
    report = json.loads((finished / "report.json").read_text())
    assert set(report["views"]) == {"recording_seconds", "drawing_seconds", "events_bytes"}
    assert 0 < report["views"]["recording_seconds"] < report["views"]["drawing_seconds"]
    written = sum(f.stat().st_size for f in (finished / "tensorboard").rglob("*") if f.is_file())
    assert 0 < report["views"]["events_bytes"] <= written


@pytest.mark.parametrize(("evaluations", "drawn"), [([8], [8]), (range(1, 9), [3, 6, 8]), ([5, 8], [5, 8])])
def test_pictures_are_drawn_at_few_evaluations_and_at_the_last(evaluations, drawn):
    before = [0, *evaluations]
    assert [step for since, step in zip(before, evaluations, strict=False) if drawing_due(since, step, 8)] == drawn


def test_pictures_can_be_switched_off_and_the_numbers_stay(config, finished, tmp_path):
    report = train(replace(config, train__pictures=False), tmp_path / "run")
    assert not pictures(tmp_path / "run") and curves(tmp_path / "run") == curves(finished)
    assert report["expert_use"] == json.loads((finished / "report.json").read_text())["expert_use"]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_resumed_run_writes_the_same_views(config, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        act_at(patch, 7, crash)
        train(config, tmp_path / "run")
    report = train(config, tmp_path / "run", resume=True)
    assert curves(tmp_path / "run") == curves(finished)
    assert texts(tmp_path / "run", EXPERTS) == texts(finished, EXPERTS)
    assert pictures(tmp_path / "run") == pictures(finished)
    assert report["expert_use"] == json.loads((finished / "report.json").read_text())["expert_use"]
    assert report["views"]["recording_seconds"] > 0


def test_the_callbacks_do_not_change_training(config, tmp_path):
    config = replace(config, train__steps=4)
    writer = Writer(tmp_path / "seen" / "tensorboard")
    watched = make_trainer(config, tmp_path / "seen", [TensorBoard(writer), ExpertViews(writer)])
    alone = make_trainer(config, tmp_path / "alone")
    torch.manual_seed(0)
    watched.fit()
    after = torch.get_rng_state()
    torch.manual_seed(0)
    alone.fit()
    assert torch.equal(after, torch.get_rng_state())
    for name, value in state_of(alone.model).items():
        assert torch.equal(value, watched.model.state_dict()[name]), name


def feed(folder, trainer, routing: dict[str, object]) -> ExpertViews:
    """Return a callback that received one update per task with the given routing, and then an evaluation."""
    writer = Writer(folder / "tensorboard")
    callback = ExpertViews(writer)
    callbacks = [TensorBoard(writer), callback]
    for each in callbacks:
        each.restore({})
    start = StartEvent(
        folder,
        trainer.config,
        list(TASKS),
        0,
        [],
        trainer.model,
        trainer.tasks,
        trainer.transforms,
        trainer.runtime,
    )
    for each in callbacks:
        each.on_start(start)
    for step, (task, record) in enumerate(routing.items(), 1):
        output = Output(torch.zeros(1), torch.zeros(()), {block: Record(routing=record) for block in MOE})
        callback.on_step(StepEvent(step, task, {"auxiliary_loss": 0.5}, {}, [output], 1.0))
    callback.on_evaluate(EvalEvent(2, "val", {}))
    writer.flush()
    return callback


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        (
            {"shapes": to(4, [2]), "fractals": to(4, [2])},
            {
                "load_cv": math.sqrt(3),
                "dead_experts": 3,
                "largest_share": 1,
                "mutual_information": 0,
                "mean_entropy": 0,
                "words": "collapsed",
            },
        ),
        (
            {"shapes": spread(4, [0, 1]), "fractals": spread(4, [2, 3])},
            {
                "load_cv": 0,
                "dead_experts": 0,
                "largest_share": 0.25,
                "mutual_information": 1,
                "mean_entropy": 1,
                "words": "use different ones",
            },
        ),
    ],
    ids=["collapse", "specialization"],
)
def test_collapse_and_specialization_are_recognized(config, tmp_path, routing, expected):
    feed(tmp_path, make_trainer(config, tmp_path), routing)
    words = expected.pop("words")
    for block in MOE:
        for name, value in expected.items():
            ((step, found),) = curves(tmp_path)[f"block {block}", name]
            assert step == 2 and found == pytest.approx(value, abs=1e-6), name
    assert words in texts(tmp_path, EXPERTS)[0]


def test_pictures_stop_at_the_budget_with_one_message(config, tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "BUDGET", 150_000)
    train(config, tmp_path)
    found = pictures(tmp_path)
    assert 0 < sum(len(png) for drawn in found.values() for _, png in drawn) < 150_000
    assert len(texts(tmp_path, "pictures")) == 1
    assert len(curves(tmp_path)["block 3", "load_cv"]) == 2  # numbers are always written


@pytest.mark.parametrize("drop", [[1], []])
def test_a_dense_run_says_why_it_has_no_expert_views(config, tmp_path, drop):
    report = train(replace(config, plan__moe_blocks=[], plan__drop_blocks=drop, train__steps=2), tmp_path)
    assert "plan.moe_blocks is empty" in texts(tmp_path, EXPERTS)[0]
    assert ("plan.drop_blocks is empty" in texts(tmp_path, EXPERTS)[0]) == (not drop)
    assert {tag for tag in pictures(tmp_path) if tag.startswith((EXPERTS, PATCHES))} == (
        {f"{PATCHES}/{task}" for task in TASKS} if drop else set()
    )
    assert not curves(tmp_path) and report["expert_use"] == {}


def test_stability_is_one_for_unchanged_routers_and_zero_for_inverted_ones(config, tmp_path):
    trainer = make_trainer(config, tmp_path)
    callback = feed(tmp_path, trainer, {"shapes": to(4, [2])})
    seen = {
        task: probe.run_probe(trainer.model, data, trainer.transforms, trainer.runtime)
        for task, data in callback.probes.items()
    }
    assert callback._stability(seen) == {3: 1.0, 5: 1.0}
    with torch.no_grad():
        for parameter in trainer.model.vit.blocks[3].mlp.router.parameters():
            parameter.neg_()
    seen = {
        task: probe.run_probe(trainer.model, data, trainer.transforms, trainer.runtime)
        for task, data in callback.probes.items()
    }
    assert callback._stability(seen)[3] == 0.0  # the top two of four experts are now the bottom two
