"""Test `TrainedRun.predict`: the predictions are those of the full forward pass for every form of input image."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tasks import CLASSES, CPU, TRANSFORMS, decided_network, network, task_data

from moe_bsr.config import Config
from moe_bsr.export.on_device import files_of
from moe_bsr.runs.load import TrainedRun

NAMES = {name: task_data(name).class_names for name in CLASSES}


@pytest.fixture
def run() -> TrainedRun:
    models = dict.fromkeys(CLASSES, decided_network().eval())
    return TrainedRun(Path("runs/mine"), Config(), models, TRANSFORMS, CPU, NAMES, 12, "live")


@pytest.fixture
def arrays() -> list[np.ndarray]:
    return [task_data("many").val.source.image(i) for i in range(3)]


@pytest.fixture
def folder(tmp_path, arrays) -> Path:
    (tmp_path / "images" / "below").mkdir(parents=True)
    for name, array in zip(("a.png", "b.PNG", "below/c.png"), arrays, strict=True):
        Image.fromarray(array).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden.png").write_text("no image")
    return tmp_path / "images"


def answers(found: dict) -> list[dict]:
    return [image["tasks"] for image in found["images"]]


def test_predictions_are_json_data_from_the_full_forward_pass(run, arrays):
    found = run.predict(arrays, top=5)
    assert json.loads(json.dumps(found)) == found
    assert (found["run"], found["step"], found["skipped"]) == ("runs/mine", 12, [])
    assert [image["image"] for image in found["images"]] == [0, 1, 2]
    images = torch.stack([TRANSFORMS.eval_image(Image.fromarray(array)) for array in arrays])
    for task, classes in CLASSES.items():
        with torch.no_grad():
            probabilities = run.models[task](TRANSFORMS.normalize(images), task).logits.softmax(1)
        for row, image in zip(probabilities, answers(found), strict=True):
            best = row.argsort(descending=True)[:5].tolist()
            assert [answer["name"] for answer in image[task]] == [f"class {c}" for c in best]
            assert len(best) == min(5, classes)
            assert [answer["probability"] for answer in image[task]] == pytest.approx(row[best].tolist())


def test_files_folders_pil_images_and_arrays_give_the_same_predictions(run, arrays, folder):
    expected = answers(run.predict(arrays))
    files = [folder / "a.png", folder / "b.PNG", folder / "below" / "c.png"]
    pictures = [Image.fromarray(array) for array in arrays]
    for images in (folder, str(folder), files, map(str, files), pictures, [files[0], pictures[1], arrays[2]]):
        assert answers(run.predict(images)) == expected
    for one, image in ((0, str(files[0])), (1, pictures[1]), (2, arrays[2])):
        assert answers(run.predict(image)) == answers(run.predict([arrays[one]]))
    assert [image["image"] for image in run.predict(folder)["images"]] == list(map(str, files))
    mixed = run.predict([folder, arrays[0]])["images"]
    assert mixed[-1]["image"] == 3 and mixed[-1]["tasks"] == expected[0]


def test_16_bit_files_and_pil_images_are_read_with_the_bits_of_the_tasks(run, tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (20, 20), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "gray.png")
    run.recorded = {task: {"spec": {"bits": 12}} for task in CLASSES}
    gray = (values.astype(np.int64) * 255 // 4095).astype(np.uint8)
    found = run.predict([tmp_path / "gray.png", Image.fromarray(values), np.stack([gray] * 3, 2)])
    assert found["skipped"] == []
    first, *others = answers(found)
    assert others == [first, first]


def test_images_of_several_batches_keep_their_order(run, arrays, monkeypatch):
    whole = run.predict(arrays)
    monkeypatch.setattr("moe_bsr.runs.predict.BATCH", 2)
    split = run.predict(iter(arrays))
    for one, other in zip(answers(whole), answers(split), strict=True):
        for task in CLASSES:
            assert [a["name"] for a in one[task]] == [a["name"] for a in other[task]]


@pytest.mark.parametrize("moe_blocks", [[], [3]], ids=str)
def test_blocks_before_the_first_with_experts_run_once_for_all_tasks_also_if_they_trained(moe_blocks, run, arrays):
    plan = {"train_blocks": [1, 3], "drop_blocks": [0, 2], "moe_blocks": moe_blocks, "head_blocks": [2]}
    model = network(CLASSES, depth=4, **plan).eval()
    run.models = dict.fromkeys(CLASSES, model)
    pixels = torch.stack([TRANSFORMS.eval_image(Image.fromarray(array)) for array in arrays])
    images = TRANSFORMS.normalize(pixels)
    with torch.no_grad():
        for task, _, logits in run.outputs(images, run.grouped(CLASSES)):
            assert torch.equal(logits, model(images, task).logits)
    assert run.predict(arrays)["groups"][0]["shared_blocks"] == (3 if moe_blocks else 4)


def test_the_frozen_blocks_run_once_for_all_tasks_that_share_them(run, arrays, monkeypatch):
    passes, model = [], run.models["many"]
    whole = model.forward_features
    monkeypatch.setattr(model, "forward_features", lambda *a, **k: passes.append(1) or whole(*a, **k))
    found = run.predict(arrays)
    assert len(passes) == 1
    assert found["groups"] == [{"tasks": ["many", "few"], "blocks": 4, "shared_blocks": 1}]
    run.models["few"] = network({"few": 3}, depth=2, train_blocks=[1], drop_blocks=[], moe_blocks=[]).eval()
    assert run.predict(arrays)["groups"] == [
        {"tasks": ["many"], "blocks": 4, "shared_blocks": 0},
        {"tasks": ["few"], "blocks": 2, "shared_blocks": 0},
    ]
    torch.manual_seed(0)  # another model with the same frozen blocks
    plan = {"train_blocks": [1, 3], "drop_blocks": [0, 2], "moe_blocks": [1, 3]}
    run.models["few"] = network({"few": 3}, depth=4, **plan).eval()
    assert run.predict(arrays)["groups"] == found["groups"]


def test_tasks_and_the_number_of_names_can_be_chosen(run, arrays):
    (image,) = answers(run.predict(arrays[0], tasks=["few"], top=1))
    assert list(image) == ["few"] and len(image["few"]) == 1
    with pytest.raises(ValueError, match="no task 'mani'.*did you mean many"):
        run.predict(arrays[0], tasks=["mani"])
    with pytest.raises(ValueError, match="top = 0: at least 1"):
        run.predict(arrays[0], top=0)


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_an_unreadable_image_is_named_and_left_out(run, arrays, tmp_path, content):
    bad = tmp_path / "bad.png"
    if content is not None:
        bad.write_bytes(content)
    found = run.predict([bad, arrays[0]])
    assert answers(found) == answers(run.predict(arrays[0]))
    (skipped,) = found["skipped"]
    assert skipped["image"] == str(bad) and str(bad) in skipped["reason"]
    assert ("no such file" if content is None else "not a readable image") in skipped["reason"]
    assert run.predict(bad)["images"] == []


def test_an_open_image_that_is_truncated_is_left_out(run, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with Image.open(tmp_path / "cut.png") as image:
        assert [skipped["image"] for skipped in run.predict([image])["skipped"]] == [0]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        None,
    ],
)
def test_invalid_image_objects_are_refused(run, image):
    with pytest.raises(ValueError, match="^image 0 is a"):
        run.predict([image])


def test_a_folder_without_images_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="no images below it .*found: nothing"):
        run.predict(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="found: 1 file that is not an image, such as .*notes.txt"):
        run.predict(tmp_path)


def test_folders_are_searched_as_training_searches_them(run, folder, tmp_path):
    """What programs leave there is ignored silently, and links are followed."""
    expected = [image["image"] for image in run.predict(folder)["images"]]
    for place in (".thumbs/a.png", "@eaDir/a.png/small.jpg", "__MACOSX/._a.png", "below/._c.png"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text("no image")
    found = run.predict(folder)
    assert [image["image"] for image in found["images"]] == expected and not found["skipped"]
    assert list(map(str, files_of([str(folder)]))) == expected  # the program of an exported bundle
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "images").symlink_to(folder)
    assert len(run.predict(tmp_path / "linked")["images"]) == len(expected)


def test_non_finite_logits_raise_an_error(run, arrays):
    with torch.no_grad():
        run.models["few"].heads["few"].bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="task few"):
        run.predict(arrays)
