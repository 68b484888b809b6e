"""Several processes compute what one process does. If one of them ends, all end with everything saved."""

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_groups
from safetensors.torch import load_file
from tiny_runs import make_config, make_trainer

from moe_bsr.api import train
from moe_bsr.cli.main import main
from moe_bsr.config import Config, ConfigError, dump
from moe_bsr.config.probe import probe_config
from moe_bsr.cost import scaling
from moe_bsr.data import UnreadableImage
from moe_bsr.model.multitask import build_on_meta
from moe_bsr.runs import checkpoint
from moe_bsr.runtime import exchange
from moe_bsr.runtime.distributed import joined
from moe_bsr.runtime.interrupt import RankLost
from moe_bsr.runtime.rendezvous import own_round
from moe_bsr.training import prototypes
from moe_bsr.training import trainer as trainer_module
from moe_bsr.training.callback import Callback
from moe_bsr.training.pace import updates_within
from moe_bsr.training.task_updates import TaskUpdates
from moe_bsr.training.trainer import TrainingFailed

pytestmark = pytest.mark.usefixtures("bare")
BATCH = 4  # images per evaluation batch, so few that every process gets batches


def config_of(folder: Path, **changes) -> Config:
    """Return a configuration with everything that could make processes differ."""
    settings = {
        "train__steps": 4,
        "train__grad_accumulation_steps": 2,
        "train__grad_clip_norm": 0.5,
        "train__ema_decay": 0.7,
        "train__eval_every": 2,
        "train__evaluate_test": False,
        "plan__moe_blocks": [5],
        "moe__gate_noise": 1.0,
        "moe__balance_loss": "across_tasks",
    }
    return make_config(folder, **settings | changes)


def in_backward(folder: Path) -> Config:
    alone = {"train__grad_accumulation_steps": 1, "train__grad_clip_norm": None}
    return config_of(folder, train__step_in_backward=True, **alone)


def joint_of(folder: Path) -> Config:
    """Return a joint configuration: four micro-batches, cached features, and two updates, because differences grow."""
    more = {"sampler__kind": "joint", "train__grad_accumulation_steps": 4, "train__steps": 2, "train__eval_every": None}
    more |= {"moe__gate": "prototype"}
    return config_of(folder, **more, data__augment=False, data__feature_cache_mb=100)


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "exchanged_mb"} for line in lines]


def assert_close(run: Path, other: Path) -> None:
    """Another summation order changes a gradient by 1e-7, and AdamW enlarges that where gradients are near zero."""
    for ours, theirs in zip(metrics(run), metrics(other), strict=True):
        assert (ours.pop("task"), ours.pop("split", "")) == (theirs.pop("task"), theirs.pop("split", ""))
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = (load_file(each / "checkpoint/2/weights.safetensors") for each in (run, other))
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 1e-3 * theirs[name].norm() + 1e-6, name


# --- work of each process; runs in `ranks.py` ---


def at_update(number: int, act: Callable[[], None]) -> None:
    """Call `act` in this process before the backward pass of update `number`."""
    backward = TaskUpdates._backward

    def acting(self, batch, place, tasks, step):
        if step + 1 == number:
            act()
        return backward(self, batch, place, tasks, step)

    TaskUpdates._backward = acting


def two(folder: Path, rank: int) -> dict:
    """Try refusals and exchanges, then train until a signal to one process stops the run after its first update."""
    trainer_module.BATCH = BATCH
    results = {}

    def refused(call: Callable[[], object]) -> str:
        with pytest.raises(ConfigError) as caught:
            call()
        return str(caught.value)

    with joined(torch.device("cpu")) as ranks:  # an existing process group for the runs below
        results["refused"] = [
            refused(lambda: train(config_of(folder, train__grad_accumulation_steps=1), folder / "no")),
            refused(lambda: train(probe_config(config_of(folder, train__grad_clip_norm=None)), folder / "no")),
            refused(lambda: train(in_backward(folder), folder / "no")),
            refused(lambda: train(config_of(folder, seed=rank), folder / "no")),
            refused(lambda: unequal(ranks, rank)),
        ]
        results["exchange"] = exchanged(ranks, rank)
        if rank == 1:
            at_update(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        report = train(config_of(folder), folder / "two", callbacks=[])
        results["stopped"] = [report[key] for key in ("status", "signal", "step", "exchanged_mb_per_update")]
    return results


def unequal(ranks, rank: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2 + rank))
    ranks.sum_gradients([parameter], {parameter: "heads.a.weight"})


def exchanged(ranks, rank: int) -> dict:
    """Sum in both precisions; return the bytes sent, the error, and whether both processes have the same bits."""
    parts = [torch.randn(1001, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    results, true = {}, sum(parts)
    for kind in ("fp32", "bf16"):
        tensors = [parts[rank][:1].clone(), parts[rank][1:].clone().view(10, 100)]
        sent = exchange.sum_all(tensors, kind)
        found = torch.cat([tensor.flatten() for tensor in tensors])
        bits = ranks.gather(found.tolist())
        results[kind] = [sent, float((found - true).norm() / true.norm()), bits[0] == bits[1]]
    return results


def killed(folder: Path, rank: int) -> dict:
    """Resume that run until one process, which does not see the run folder, is killed in its third update."""
    trainer_module.BATCH = BATCH
    if rank == 1:
        at_update(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(TrainingFailed) as caught:
        train(config_of(folder), folder / ("elsewhere" if rank else "two"), resume=True, callbacks=[])
    return {"said": str(caught.value), "steps": checkpoint.steps(folder / "two")}


def four(folder: Path, rank: int) -> dict:
    trainer_module.BATCH = BATCH
    if rank:
        prototypes.place = None  # only the first process finds clusters, because they may differ by a bit
    report = train(joint_of(folder), folder / "four", callbacks=[])
    for task in report["tasks"].values():
        del task["images_per_second"]
    return report["tasks"]


def dry(folder: Path, rank: int) -> list[int]:
    """Make a dry run that is possible, and one whose micro-batches cannot be divided. Return the exit statuses."""
    file = folder / f"dry{rank}.yaml"
    file.write_text(dump(config_of(folder)))
    call = ["train", str(file), "--dry-run", "--run", str(folder / "dry")]
    with joined(torch.device("cpu")):  # an existing process group for both
        return [main(call), main([*call, "train.grad_accumulation_steps=1"])]


def failing(folder: Path, rank: int) -> str:
    """Fail in one process while the others wait for it."""
    with pytest.raises((RankLost, UnreadableImage)) as caught, joined(torch.device("cpu")) as ranks:
        if rank == 1:
            raise UnreadableImage("bee.png: not a readable image")
        ranks.total(np.zeros(1))
    return str(caught.value)


# --- the tests ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the runs of one process."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "BATCH", BATCH)
        train(config_of(folder), folder / "one", callbacks=[])
        train(joint_of(folder), folder / "joint one", callbacks=[])
    return folder


@pytest.fixture(scope="module")
def ended(folder) -> dict[str, list]:
    return run_groups(__file__, folder, {"two": 2, "killed": 2, "four": 4, "dry": 2, "failing": 2})


@pytest.fixture(scope="module")
def results(ended) -> list[dict]:
    assert [each.status for each in ended["two"]] == [0, 0], ended["two"]
    return [each.result for each in ended["two"]]


def test_a_signal_to_one_process_stops_all_with_everything_saved(folder, results):
    assert results[0]["stopped"] == results[1]["stopped"]
    status, number, step, sent = results[0]["stopped"]
    assert (status, number, step) == ("interrupted", signal.SIGTERM, 1)
    assert f"by 2 processes that exchange {sent:.1f} MB an update" in (folder / "two" / "report.md").read_text()


def test_a_killed_process_loses_no_update_and_the_run_is_bitwise_equal(folder, results, ended, monkeypatch):
    """The run is stopped by a signal, resumed by two processes of which one is killed, and resumed by one."""
    survivor, gone = ended["killed"]
    assert gone.status == -signal.SIGKILL
    assert survivor.status == 0, survivor.said
    said = survivor.result["said"]
    assert "training ended at step 2: rank 1 (process" in said and "is gone" in said and "resume=True" in said
    assert survivor.result["steps"] == [1, 2]
    lines: list[str] = []
    told_at_start = type("Told", (Callback,), {"on_start": lambda self, start: lines.extend(start.about)})
    monkeypatch.setattr(trainer_module, "BATCH", BATCH)
    train(config_of(folder), folder / "two", resume=True, callbacks=[told_at_start()])
    assert any("not bit-exact" in line and "processes was 2, now 1" in line for line in lines)
    assert metrics(folder / "two") == metrics(folder / "one")
    for name in ("weights", "optimizer", "average"):
        file = f"checkpoint/4/{name}.safetensors"
        assert (folder / "two" / file).read_bytes() == (folder / "one" / file).read_bytes(), name


def test_only_gradients_that_exist_are_exchanged(folder, results, ended):
    sent = {}
    for line in (folder / "two" / "metrics.jsonl").read_text().splitlines():
        if "exchanged_mb" in (line := json.loads(line)):
            sent[line["task"]] = line["exchanged_mb"]
    moments = load_file(folder / "one" / "checkpoint" / "4" / "optimizer.safetensors")
    trained = {name.rpartition("/")[0]: value for name, value in moments.items() if name.endswith("exp_avg")}
    for task, others in {"shapes": ".fractals.", "fractals": ".shapes."}.items():
        own = [value.nbytes for name, value in trained.items() if others not in f".{name}."]
        assert sent[task] == sum(own) / 1e6 < sum(value.nbytes for value in trained.values()) / 1e6
    model = build_on_meta(config_of(folder), {"shapes": 10, "fractals": 12})
    assert scaling.exchanged(model, config_of(folder))[0] / 1e6 == pytest.approx(sum(sent.values()) / 2, abs=1e-6)


def test_four_processes_joint_sampling_and_a_feature_cache(folder, ended):
    assert [each.status for each in ended["four"]] == [0] * 4, "\n".join(each.said for each in ended["four"])
    first, *others = [each.result for each in ended["four"]]
    assert all(other == first for other in others)
    for task, scores in json.loads((folder / "joint one" / "report.json").read_text())["tasks"].items():
        assert first[task]["n"] == scores["n"] and first[task]["chance"] == scores["chance"]  # each image once
    assert_close(folder / "four", folder / "joint one")


def test_incompatible_settings_are_refused(folder, results):
    for accumulation, probe, backward, seeds, unequal in (each["refused"] for each in results):
        assert "train.grad_accumulation_steps = 1" in accumulation and "train.grad_accumulation_steps=2" in accumulation
        assert "train.optimizer = 'lbfgs'" in probe and "without torchrun" in probe
        assert "train.step_in_backward = True: false with several processes" in backward
        assert "rank 1 (process" in seeds and "another configuration than rank 0" in seeds
        assert "another set of gradients" in unequal
    assert not (folder / "no").exists()


def test_a_dry_run_is_printed_by_the_first_process(folder, ended):
    first, other = ended["dry"]
    assert first.result == other.result == [0, 2], first.said + other.said
    assert first.said.count("shapes: 10 classes, train 23") == 1 and "train.grad_accumulation_steps = 1" in first.said
    assert other.said == ""
    assert not (folder / "dry").exists()


def test_the_exchange_is_exact_in_fp32_and_half_as_large_in_bf16(results):
    for each in results:
        (sent, error, equal), (halved, rounding, equal_too) = each["exchange"]["fp32"], each["exchange"]["bf16"]
        assert equal and equal_too and error == 0
        assert halved == sent / 2 and 1e-4 < rounding < 4e-3


def test_an_error_in_one_process_is_reported_by_the_others(ended):
    first, other = (each.result for each in ended["failing"])
    assert "bee.png" in other and first.startswith("rank 1 (process") and "bee.png: not a readable image" in first


def test_the_report_lists_unreadable_images_of_all_processes(tmp_path, monkeypatch):
    trainer = make_trainer(make_config(tmp_path), tmp_path / "run")
    trainer.transforms.skipped["shapes"] = {"val": {"a.png": "empty"}}
    elsewhere = {"shapes": {"val": {"b.png": "cut off"}}, "fractals": {"train": {"c.png": "empty"}}}
    monkeypatch.setattr(
        trainer.ranks, "gather", lambda value: [value, elsewhere] if isinstance(value, dict) else [value]
    )
    trainer._evaluate("val")
    assert trainer.state.skipped == elsewhere | {"shapes": {"val": {"a.png": "empty", "b.png": "cut off"}}}


def test_exchange_statistics_are_discarded_while_speed_is_measured(tmp_path, monkeypatch):
    trainer = make_trainer(make_config(tmp_path, train__steps=None, train__minutes=0.01), tmp_path / "run")
    updates, discarded, take = [], [], trainer.take
    monkeypatch.setattr(trainer, "take", lambda *arguments: updates.append(1) or take(*arguments))
    monkeypatch.setattr(trainer.ranks, "numbers", lambda: discarded.append(1) or {})
    updates_within(0.1, trainer)
    assert len(discarded) == len(updates) > 0


def test_a_new_round_ignores_entries_of_dead_processes(monkeypatch):
    """A launcher's store outlives the processes, so it holds names and confirmations of an older round."""
    store = torch.distributed.HashStore()
    for key, value in {"round": "old", "old/1": "dead", "old/all": "dead", "old/address": "nowhere"}.items():
        store.set(key, value)
    with ThreadPoolExecutor(2) as threads:
        late = threads.submit(own_round, store, 1, 2)  # reads the old round's name first
        while not store.check(["old/1"]) or store.get("old/1") == b"dead":
            time.sleep(0.01)
        first, other = own_round(store, 0, 2), late.result(timeout=20)
    first.set("address", "here")
    assert other.get("address") == b"here" and not other.check(["nowhere"])
