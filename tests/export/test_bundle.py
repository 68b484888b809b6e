"""Test export bundles: their files, the same results as the run, and the refusal of damaged or foreign files."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_data import picture
from tiny_names import AWKWARD
from tiny_runs import TASKS, make_config

import moe_bsr
from moe_bsr.config import ConfigError

onnx = pytest.importorskip("onnx", reason="the extra export")
pytest.importorskip("onnxruntime", reason="the extra export")

from moe_bsr.export import bundle as bundles  # noqa: E402
from moe_bsr.export import parity  # noqa: E402
from moe_bsr.export.bundle import export  # noqa: E402
from moe_bsr.export.on_device import Bundle, Refused, check_images, sha256  # noqa: E402
from moe_bsr.runs.share import share  # noqa: E402

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Train a run in bf16, so that its frozen matrices are stored in 16 bits."""
    folder = tmp_path_factory.mktemp("run")
    config = make_config(folder, runtime__precision="bf16", train__steps=8, plan__train_blocks=[3, 5])
    moe_bsr.train(config, folder / "run", callbacks=[])
    return folder / "run"


def loaded(run: Path, **options):
    return moe_bsr.load(run, device="cpu", **options)


@pytest.fixture(scope="module")
def result(run) -> dict:
    return export(loaded(run))


@pytest.fixture(scope="module")
def folder(result) -> Path:
    return Path(result["bundle"])


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def answers_of_run(trained, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the validation images as input arrays, and the model's logits in float32."""
    inputs = torch.cat([inputs for inputs, _ in parity.batches(trained, task, "val", 100)])
    model = trained.models[task].float()
    with torch.no_grad():
        return inputs.numpy(), model(inputs, task).logits.numpy()


def test_graphs_give_the_float32_logits_of_the_run(run, folder, result):
    trained = loaded(run)
    together = Bundle(folder)
    for task in TASKS:
        inputs, expected = answers_of_run(trained, task)
        for found in (Bundle(folder, [task]).logits(inputs)[task], together.logits(inputs)[task]):
            assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
        info = result["tasks"][task]
        assert info["n"] == info["parity"]["images"] == len(expected) == info["parity"]["equal"]
        labels = trained.data(task).val.labels
        assert info["top1"] == pytest.approx(100 * (expected.argmax(1) == labels).mean())
        assert info["top1_low"] <= info["top1"] <= info["top1_high"]


def test_the_files_of_a_bundle_and_their_descriptions(run, folder, result):
    assert folder == run / "export" and not list(run.glob(".export*"))
    of_tasks = {f"{task}.{end}" for task in TASKS for end in ("onnx", "data", "txt")}
    others = {"all_tasks.onnx", "weights.data", "config.json", "preprocessor_config.json", "parity.json"}
    assert {file.name for file in folder.iterdir()} == of_tasks | others | {"README.md", "predict.py"}
    assert result["files"] == {file.name: file.stat().st_size for file in folder.iterdir()}
    assert result["bytes"] == result["whole_bytes"] == sum(result["files"].values())
    config = json.loads((folder / "config.json").read_text())
    assert config["sha256"] == {file.name: sha256(file) for file in folder.iterdir() if file.name != "config.json"}
    assert config["architecture"] == "test_vit" and config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    names = loaded(run).class_names
    for task, (classes, _) in TASKS.items():
        about = config["tasks"][task]
        assert about["num_classes"] == classes and about["label_names"] == names[task]
        assert (folder / about["labels"]).read_text().splitlines() == names[task]
        model = onnx.load(folder / about["graph"], load_external_data=False)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        hashes = {name: config["sha256"][name] for name in (f"{task}.data", "weights.data")}
        assert json.loads(metadata["data_sha256"]) == hashes and json.loads(metadata["tasks"]) == {task: names[task]}
        assert max(len(tensor.raw_data) for tensor in model.graph.initializer) < 100  # shapes, but no weights


def test_files_of_a_task_do_not_depend_on_the_other_tasks(run, folder, tmp_path):
    """A device with a bundle of other tasks needs only two small new files, and no new weights.data."""
    alone = Path(export(loaded(run, tasks=["fractals"]), tmp_path / "alone")["bundle"])
    for name in ("weights.data", "fractals.data", "fractals.onnx", "fractals.txt"):
        assert (alone / name).read_bytes() == (folder / name).read_bytes(), name
    assert not (alone / "all_tasks.onnx").exists()
    assert Bundle(alone).check()["ok"]


def test_the_card_states_accuracy_cost_licenses_and_how_to_run(folder, result):
    text = (folder / "README.md").read_text()
    for task in TASKS:
        assert f"| {task} | {TASKS[task][0]} | {result['tasks'][task]['top1']:.1f} |" in text
        assert f"* {task}: {task}; license of the images: none" in text
    for words in (
        "95 % interval",
        "Test accuracy of the run",
        "MB on disk",
        "ms of CPU per image",
        "python predict.py --check",
    ):
        assert words in text, words


@pytest.mark.parametrize("name", ["weights.data", "shapes.data", "shapes.onnx"])
def test_a_damaged_or_missing_file_is_refused_by_name(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(Refused, match=f"{name}: damaged, or of another export"):
        Bundle(copied, ["shapes"])
    (copied / name).unlink()
    with pytest.raises(Refused, match=f"{name}: missing"):
        Bundle(copied, ["shapes"])


def test_a_graph_with_the_weights_of_another_run_is_refused(copied):
    """The graph has a hash of its weights, so an edited config.json does not help."""
    config = json.loads((copied / "config.json").read_text())
    (copied / "weights.data").write_bytes((copied / "weights.data").read_bytes()[::-1])
    config["sha256"]["weights.data"] = sha256(copied / "weights.data")
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="shapes.onnx: made for another weights.data"):
        Bundle(copied, ["shapes"])


def test_the_check_fails_if_a_device_computes_other_logits(copied, monkeypatch):
    bundle = Bundle(copied)
    assert bundle.check()["ok"]
    whole = bundle.logits
    monkeypatch.setattr(bundle, "logits", lambda inputs: {t: y + 0.01 * y[:, :1] for t, y in whole(inputs).items()})
    report = bundle.check()
    assert not report["ok"] and all(task["equal"] == 8 for task in report["tasks"].values())


def test_predict_works_without_this_package_and_agrees_with_the_run(run, copied, tmp_path):
    """Uses a new interpreter in which torch, timm and this package cannot be imported."""
    picture(3, (50, 40)).save(tmp_path / "a.png")
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (32, 32, 4), np.uint8)).save(tmp_path / "b.png")
    (tmp_path / "c.jpg").write_bytes(b"no image")
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'timm', 'torchvision', 'moe_bsr', 'onnx']));"
    program = str(copied / "predict.py")
    start = f"{block} import runpy; sys.argv[0] = 'predict.py'; runpy.run_path({program!r}, run_name='__main__')"
    call = [sys.executable, "-I", "-c", start, str(tmp_path), "--json", "--top", "12"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 1 and "c.jpg: not a readable image" in done.stderr, done.stderr
    found = [each for each in json.loads(done.stdout) if "copied" not in each["image"]]
    trained = loaded(run)
    for model in trained.models.values():
        model.float()
    trained.runtime = type(trained.runtime)(trained.runtime.device, "fp32", 1, "")
    expected = trained.predict([tmp_path / "a.png", tmp_path / "b.png"], top=12)["images"]
    assert [each["image"] for each in found] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    for mine, theirs in zip(found, expected, strict=True):
        for task in TASKS:
            of_run = {answer["name"]: answer["probability"] for answer in theirs["tasks"][task]}
            of_bundle = {answer["name"]: answer["probability"] for answer in mine["tasks"][task]}
            assert of_bundle == pytest.approx(of_run, abs=0.01)  # Pillow resizes: pixels differ by 1 or 2 of 255


@pytest.mark.parametrize(
    "options", [{}, {"crop_mode": "border"}, {"crop_mode": "squash"}, {"resize": "squash"}], ids=str
)
@pytest.mark.parametrize("size", [(90, 70), (70, 90), (40, 40), (20, 33)], ids=str)
def test_pixels_are_those_of_the_evaluation_transform(folder, options, size):
    from moe_bsr.data import ImageTransforms

    bundle = Bundle(folder, ["shapes"])
    about = bundle.config["pretrained_cfg"]
    about.update({"crop_pct": 0.875, "resize": "timm"} | options)
    fields = {key: about[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode", "resize")}
    image = picture(1, size)
    expected = ImageTransforms(size=32, **fields).eval_image(image).numpy()
    apart = np.abs(bundle.pixels(image).astype(int) - expected)  # Pillow and torch round differently
    assert apart.mean() < 0.5 and np.quantile(apart, 0.95) <= 2
    assert np.array_equal(bundle.normalize(expected[None])[0], _normalized(fields, expected))


def _normalized(fields: dict, pixels: np.ndarray) -> np.ndarray:
    from moe_bsr.data import ImageTransforms

    return ImageTransforms(size=32, **fields).normalize(torch.from_numpy(pixels)[None])[0].numpy()


def test_int8_is_smaller_and_reports_its_accuracy(run, folder, result, tmp_path):
    info = export(loaded(run), tmp_path / "int8", quantize=True)
    assert info["precision"] == "int8" and info["files"]["weights.data"] < 0.5 * result["files"]["weights.data"]
    for task in TASKS:
        numbers = info["tasks"][task]
        assert numbers["float32"] == {key: result["tasks"][task][key] for key in numbers["float32"]}
        assert 0.9 * numbers["n"] - 1 <= numbers["int8"]["equal"] <= numbers["n"]
        # Routers and heads are not quantized, so each task's own file is unchanged.
        assert (tmp_path / "int8" / f"{task}.data").read_bytes() == (folder / f"{task}.data").read_bytes()
    model = onnx.load(tmp_path / "int8" / "shapes.onnx", load_external_data=False)
    assert max(len(tensor.raw_data) for tensor in model.graph.initializer) < 100
    assert Bundle(tmp_path / "int8").check()["ok"]


def test_fewer_experts_are_the_most_used_ones_and_computed_exactly(run, result, tmp_path):
    trained = loaded(run)
    info = export(trained, tmp_path / "two", experts=2)
    assert info["bytes"] <= info["whole_bytes"] == pytest.approx(result["bytes"], rel=0.05)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    for task in TASKS:
        inputs = torch.cat([inputs for inputs, _ in parity.batches(trained, task, "train", 256)])
        with torch.no_grad():
            routing = trained.models[task](inputs, task).routing
        for block, kept in config["tasks"][task]["experts"].items():
            assert kept == sorted(routing[int(block)].importance.argsort(descending=True)[:2].tolist())
        numbers = info["tasks"][task]
        assert numbers["parity"]["decided_otherwise"] == 0  # compared with the model that has only these experts
        assert {key: numbers["whole"][key] for key in ("n", "top1")} == {
            key: result["tasks"][task][key] for key in ("n", "top1")
        }
    one = export(loaded(run, tasks=["shapes"]), tmp_path / "one", experts=2)
    assert one["bytes"] < 0.9 * one["whole_bytes"]


@pytest.mark.parametrize(("count", "allowed"), [(1, "2 .each token"), (5, ".* to 4 ")])
def test_too_few_or_too_many_experts_are_refused(run, tmp_path, count, allowed):
    with pytest.raises(ConfigError, match=f"experts = {count}: {allowed}"):
        export(loaded(run), tmp_path / "out", experts=count)
    assert not list(tmp_path.iterdir())


def test_fewer_experts_without_a_readable_training_image_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "batches", lambda run, task, split, most: iter(()))  # data.unreadable: skip
    with pytest.raises(ValueError, match="task shapes: no training image can be read, so the use of its experts"):
        export(loaded(run), tmp_path / "out", experts=2)
    assert not list(tmp_path.iterdir())


def test_models_of_single_tasks_share_their_frozen_blocks(tmp_path):
    config = make_config(
        tmp_path, mode="single_task", train__steps=1, train__evaluate_test=False, plan__train_blocks=[3, 5]
    )
    moe_bsr.train(config, tmp_path / "run", callbacks=[])
    trained = loaded(tmp_path / "run")
    info = export(trained)
    bundle = Bundle(info["bundle"])
    assert info["files"]["shapes.data"] > info["files"]["weights.data"] > 10_000
    kinds = [
        node.op_type for node in onnx.load(Path(info["bundle"]) / "all_tasks.onnx", load_external_data=False).graph.node
    ]
    assert kinds.count("Conv") == 1
    for task in TASKS:
        inputs, expected = answers_of_run(trained, task)
        assert np.abs(bundle.logits(inputs)[task] - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("alone", [True, False], ids=["a task's graph", "the graph of all"])
def test_a_graph_with_other_logits_than_the_run_is_not_written(run, tmp_path, monkeypatch, alone):
    write = bundles.write

    def wrong(graph, part, images):
        logits = write(graph, part, images)
        again = len(graph.outputs) > 0  # fractals in the graph of all tasks, where shapes come first
        return graph.op("Mul", logits, graph.constant(1.001, np.float32)) if alone or again else logits

    monkeypatch.setattr(bundles, "write", wrong)
    graph = "shapes.onnx" if alone else "all_tasks.onnx, fractals"
    with pytest.raises(parity.NotEqual, match=f"{graph}: its logits differ from the run's by up to .*nothing was"):
        export(loaded(run), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"format": "executorch", "quantize": True}, "int8 = True: leave it out"), ({"format": "tflite"}, "format = ")],
)
def test_formats_that_do_not_exist_are_refused(run, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export(loaded(run), tmp_path / "out", **options)


def test_a_run_on_another_device_is_refused(run, tmp_path):
    trained = loaded(run)
    trained.runtime = dataclasses.replace(trained.runtime, device=torch.device("cuda"))
    with pytest.raises(ConfigError, match="device = 'cuda': cpu: load the run with device='cpu'"):
        export(trained, tmp_path / "out")


@pytest.mark.parametrize("name", ["given", "given.zip"])
def test_a_shared_run_is_exported_with_the_words_of_its_own_card(run, tmp_path, name):
    share(run, tmp_path / name)
    export(loaded(tmp_path / name, tasks=["shapes"]), tmp_path / "out", images=5)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "test_vit, random weights" in text and "Test accuracy of the run" in text
    assert Bundle(tmp_path / "out").check()["ok"]


def test_the_folder_must_be_named_for_a_zip_file(run, tmp_path):
    share(run, tmp_path / "given.zip")
    with pytest.raises(ConfigError, match="given.zip is a zip file: name the folder to write"):
        export(loaded(tmp_path / "given.zip", tasks=["shapes"]))


def test_a_damaged_report_is_refused_before_the_work(run, tmp_path):
    broken = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    (broken / "report.json").write_text("{")
    steps = []
    with pytest.raises(ConfigError, match="report.json: cut or damaged"):
        export(loaded(broken), on_step=steps.append)
    assert steps == []


def test_an_existing_folder_is_not_replaced(run, folder):
    with pytest.raises(ConfigError, match="export exists; remove it, or name another folder"):
        export(loaded(run))


def test_unusual_class_names_are_written_one_per_line_and_printed_on_any_terminal(run, tmp_path):
    trained = loaded(run, tasks=["shapes"])
    names = list(AWKWARD.values())[8:18]
    trained.class_names["shapes"] = names
    info = export(trained, tmp_path / "out")
    assert len((tmp_path / "out" / "shapes.txt").read_text().split("\n")) == 11
    bundle = Bundle(info["bundle"])
    assert {answer["name"] for answer in bundle.predict(picture(1), top=10)["shapes"]} == set(names)
    picture(1).save(tmp_path / "a.png")
    call = [sys.executable, str(tmp_path / "out" / "predict.py"), str(tmp_path / "a.png"), "--top", "10"]
    ascii = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=ascii)
    assert done.returncode == 0 and "\\u" in done.stdout, done.stderr


def test_the_export_says_that_images_of_16_bits_are_not_read(run, tmp_path):
    trained = loaded(run, tasks=["shapes"])
    trained.recorded["shapes"]["spec"]["bits"] = 12
    with pytest.warns(UserWarning, match=r"shapes: .*reads images of 8 bits only: .* value \* 255 // 4095"):
        export(trained, tmp_path / "out", images=5)
    assert "to value * 255 // 4095." in (tmp_path / "out/README.md").read_text()
    with pytest.raises(Refused, match="more than 8 bits: convert it to 8 .README.md says how"):
        Bundle(tmp_path / "out").predict(Image.fromarray(np.zeros((9, 9), np.uint16)))


def test_check_images_are_deterministic():
    images = check_images(32)
    assert images.shape == (8, 3, 32, 32) and images.dtype == np.uint8 and images.std() > 40
    assert np.array_equal(check_images(32), images) and len({image.tobytes() for image in images}) == 8
