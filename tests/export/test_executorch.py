"""Test that ExecuTorch programs give the same results as the run. Skipped without the package."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import TASKS, make_config

import moe_bsr

pytest.importorskip("onnx", reason="the extra export")
pytest.importorskip("executorch", reason="pip install executorch")

from moe_bsr.export import executorch, parity
from moe_bsr.export.bundle import export
from moe_bsr.export.fewer_experts import reduced
from moe_bsr.export.on_device import Bundle, Refused, sha256

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Train a run with experts and two token drops, of which the second also ranks the fused token of the first."""
    folder = tmp_path_factory.mktemp("run")
    backbone = {"backbone__name": "vit_pico_patch8_64", "backbone__image_size": None}
    blocks = {"plan__train_blocks": [3, 5], "plan__moe_blocks": [5], "moe__mlp_ratio": 1}
    config = make_config(folder, runtime__precision="bf16", train__steps=8, **backbone, **blocks)
    moe_bsr.train(config, folder / "run", callbacks=[])
    return folder / "run"


@pytest.fixture(scope="module")
def result(run) -> dict:
    return export(moe_bsr.load(run, device="cpu"), format="executorch", experts=2)


@pytest.fixture(scope="module")
def folder(result) -> Path:
    return Path(result["bundle"])


def test_programs_give_the_float32_logits_of_the_run(run, folder, result):
    trained, together = moe_bsr.load(run, device="cpu"), Bundle(folder)
    for task in TASKS:
        inputs = torch.cat([inputs for inputs, _ in parity.batches(trained, task, "val", 100)])
        kept = {int(block): ids for block, ids in together.config["tasks"][task]["experts"].items()}
        with torch.no_grad():
            expected = reduced(trained.models[task].float(), task, kept)(inputs, task).logits.numpy()
        alone = Bundle(folder, [task]).logits(inputs.numpy())[task]
        assert np.abs(alone - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
        assert np.array_equal(together.logits(inputs.numpy(), [task])[task], alone)
        info = result["tasks"][task]
        assert info["n"] == info["parity"]["images"] == len(expected) == info["parity"]["equal"]
        assert b"XnnpackBackend" in (folder / f"{task}.pte").read_bytes()


def test_the_bundle_has_the_same_form_as_an_onnx_bundle(folder):
    of_tasks = {f"{task}.{end}" for task in TASKS for end in ("pte", "txt")}
    others = {"config.json", "preprocessor_config.json", "parity.json", "README.md", "predict.py"}
    assert {file.name for file in folder.iterdir()} == of_tasks | others
    config = json.loads((folder / "config.json").read_text())
    assert config["sha256"] == {file.name: sha256(file) for file in folder.iterdir() if file.name != "config.json"}
    text = (folder / "README.md").read_text()
    assert "pip install executorch torch numpy pillow" in text and "(1, 3, S, S)" in text and "OpenVINO" not in text


def test_the_check_needs_only_executorch(folder):
    """Uses a new interpreter in which timm, this package and onnxruntime cannot be imported."""
    block = "import sys; sys.modules.update(dict.fromkeys(['timm', 'moe_bsr', 'onnx', 'onnxruntime']));"
    program = str(folder / "predict.py")
    start = f"{block} import runpy; sys.argv[0] = 'predict.py'; runpy.run_path({program!r}, run_name='__main__')"
    call = [sys.executable, "-I", "-c", start, "--check", "--json"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"].keys() == TASKS.keys()


def test_a_damaged_program_is_refused_by_name(folder, tmp_path):
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    (copied / "shapes.pte").write_bytes((copied / "fractals.pte").read_bytes())
    with pytest.raises(Refused, match="shapes.pte: damaged, or of another export"):
        Bundle(copied, ["shapes"])


def test_a_program_with_other_logits_than_the_run_is_not_written(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(executorch, "lowered", lambda part, size: (folder / f"{part.task}.pte").read_bytes())
    trained = moe_bsr.load(run, device="cpu")
    with torch.no_grad():
        trained.models["fractals"].heads["fractals"].bias[0] += 0.01
    with pytest.raises(parity.NotEqual, match=r"fractals.pte: its logits differ from the run's by up to 1.0e-02"):
        export(trained, tmp_path / "out", format="executorch", experts=2)
    assert not list(tmp_path.iterdir())
