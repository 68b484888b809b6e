"""Test that forged checkpoints with matching hashes are refused in one line that names the file."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import LATE, make_config, make_trainer

import moe_bsr
from moe_bsr.config import Config
from moe_bsr.runs import checkpoint
from moe_bsr.runs.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return make_config(
        tmp_path_factory.mktemp("tasks"),
        **LATE,
        train__steps=2,
        train__checkpoint_every=1,
        train__ema_decay=0.5,
        train__evaluate_test=False,
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    moe_bsr.train(config, folder, callbacks=[])
    return folder


@pytest.fixture(scope="module")
def trainer(config, tmp_path_factory):
    return make_trainer(config, tmp_path_factory.mktemp("never") / "run")


@pytest.fixture
def newest(trained, tmp_path) -> Path:
    """Copy the run and return the last checkpoint of the copy, which the test may forge."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run" / "checkpoint" / "2"


def make_hashes_fit(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.name in manifest["sha256"]
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refusals(trainer, newest: Path, whole: bool = True) -> list[str]:
    """Return the error messages of resuming the run and, if `whole`, of loading it."""
    run, lines = newest.parent.parent, []
    attempts = [lambda: trainer.state.resume(run, trainer.tasks, trainer.runtime)]
    for attempt in attempts + [lambda: moe_bsr.load(run, "last")] * whole:
        with pytest.raises(CheckpointError) as refusal:
            attempt()
        lines.append(str(refusal.value))
    assert all(str(newest) in each and "\n" not in each and len(each) < 700 for each in lines)
    return lines


def edited(**changes):
    def edit(state: dict) -> dict:
        return {key: value for key, value in (state | changes).items() if value is not ...}

    return edit


STATES = [
    *[lambda state, other=other: other for other in ([], {}, None, 5, "text", [1, 2])],
    *[edited(**{key: ...}) for key in ("step", "pending_evaluation", "seconds", "best_step", "callbacks", "moments")],
    *[edited(step=value) for value in (1, 3, "2", None, 2.0, True, -2, [2])],
    *[edited(best_step=value) for value in ("../../elsewhere", "2", 1.5, True, -1, 0, 9, [1], {})],
    *[edited(seconds=value) for value in ("1", None, float("nan"), float("inf"), -1.0)],
    *[edited(pending_evaluation=value) for value in ("no", 1, None)],
    *[edited(best_mean_top1=value) for value in ("50", None, float("nan"))],
    *[edited(best_scores=value) for value in ([], {"shapes": 5}, {"shapes": {}}, {})],
    *[edited(untold_scores=value) for value in (5, {"elsewhere": {"top1": 5.0}})],
    *[edited(callbacks=value) for value in ([], None, {"jsonl": 5})],
]


@pytest.mark.parametrize("edit", STATES)
def test_a_state_that_no_trainer_wrote_is_refused(trainer, newest, edit):
    file = newest / "state.json"
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    make_hashes_fit(newest)
    assert all("state.json" in line for line in refusals(trainer, newest))


@pytest.mark.parametrize("text", ["", "{", "nan", "[" * 100_000, "\x00", '{"step": 1' + "0" * 5000 + "}"])
def test_a_state_that_is_not_valid_json_is_refused(trainer, newest, text):
    (newest / "state.json").write_text(text)
    make_hashes_fit(newest)
    assert all("state.json" in line for line in refusals(trainer, newest))


def without(number: int):
    return lambda tensors: dict(list(tensors.items())[number:])


def first(change):
    """Change the largest tensor only."""

    def edit(tensors: dict) -> dict:
        name = max(tensors, key=lambda each: tensors[each].numel())
        return tensors | {name: change(tensors[name])}

    return edit


def one_number(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return first(change)


TENSORS = {
    "empty": lambda tensors: {},
    "one less": without(1),
    "one more": lambda tensors: tensors | {"other": torch.ones(2)},
    "flat": first(torch.flatten),
    "shorter": first(lambda t: t[:-1]),
    "scalar": first(lambda t: t.view(-1)[0]),
    "no numbers": first(lambda t: t[:0]),
    "half": first(torch.Tensor.half),
    "double": first(torch.Tensor.double),
    "bf16": first(torch.Tensor.bfloat16),
    "whole": first(lambda t: t.to(torch.int64)),
    "bool": first(torch.Tensor.bool),
    "float8": first(lambda t: t.to(torch.float8_e4m3fn)),
    "complex": first(lambda t: t.to(torch.complex64)),
    "nan": one_number(float("nan")),
    "inf": one_number(float("inf")),
    "renamed": lambda tensors: {f"module.{name}": value for name, value in tensors.items()},
}
OTHERS = itertools.cycle(["average", "optimizer"])


@pytest.mark.parametrize("name, harm", [*(("weights", harm) for harm in TENSORS), *zip(OTHERS, TENSORS, strict=False)])
def test_tensors_that_do_not_fit_the_run_are_refused(trainer, newest, name, harm):
    edit, file = TENSORS[harm], newest / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in edit(load_file(file)).items()}, file)
    make_hashes_fit(newest)
    refusals(trainer, newest, whole=name != "optimizer")


def test_a_parameter_without_optimizer_state_is_refused(trainer, newest):
    file = newest / "optimizer.safetensors"
    moments = load_file(file)
    parameter = next(iter(moments)).rpartition("/")[0]
    save_file({name: value for name, value in moments.items() if not name.startswith(f"{parameter}/")}, file)
    make_hashes_fit(newest)
    assert "optimizer.safetensors" in refusals(trainer, newest, whole=False)[0]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 40, b"\x00" * 8, (2**60).to_bytes(8, "little") + b"{}"])
def test_an_invalid_safetensors_file_is_refused(trainer, newest, content):
    (newest / "weights.safetensors").write_bytes(content)
    make_hashes_fit(newest)
    assert all("weights.safetensors" in line for line in refusals(trainer, newest))


@pytest.mark.parametrize("name", ["average", "optimizer"])
def test_a_file_removed_from_the_checkpoint_and_its_manifest_is_refused(trainer, newest, name):
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["sha256"][f"{name}.safetensors"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    (newest / f"{name}.safetensors").unlink()
    refusals(trainer, newest, whole=name == "average")


def test_a_checkpoint_after_the_last_step_of_the_run_is_refused(config, newest):
    beyond = newest.rename(newest.with_name("30"))
    for name, key in (("state.json", "step"), ("manifest.json", "step")):
        content = json.loads((beyond / name).read_text())
        (beyond / name).write_text(json.dumps(content | {key: 30}))
    make_hashes_fit(beyond)
    (beyond.parent.parent / "report.json").unlink()
    with pytest.raises(CheckpointError, match=r"30 is after the run's last step, train\.steps = 2"):
        moe_bsr.train(config, beyond.parent.parent, resume=True, callbacks=[])


def test_a_missing_evaluation_of_the_last_step_is_run_on_resume(config, newest):
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(
        json.dumps(state | {"best_step": None, "best_mean_top1": None, "best_scores": None, "untold_scores": None})
    )
    make_hashes_fit(newest)
    (newest.parent.parent / "report.json").unlink()
    report = moe_bsr.train(config, newest.parent.parent, resume=True, callbacks=[])
    assert report["selected_step"] == 2 and report["mean_top1"] is not None


def test_an_invalid_callback_state_fails_only_that_callback(config, trained, tmp_path):
    class Counting(moe_bsr.training.callback.Callback):
        def restore(self, state) -> None:
            self.count = state["count"]

    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    with pytest.warns(UserWarning, match="callback 'Counting' failed in restore: KeyError: 'count'"):
        report = moe_bsr.train(config, tmp_path / "run", resume=True, callbacks=[Counting()])
    assert report["status"] == "finished"


def test_a_valid_checkpoint_is_accepted(trainer, newest):
    run = newest.parent.parent
    assert trainer.state.resume(run, trainer.tasks, trainer.runtime)[-1] == f"resumed from {newest}"
    assert moe_bsr.load(run, "last").step == 2 and checkpoint.damage(newest) is None
