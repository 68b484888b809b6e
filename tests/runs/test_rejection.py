"""Test out-of-task detection: a run learns to reject images of no task, and the detectors are tied to its weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import LATE, make_config
from tiny_tasks import task_data

import moe_bsr
from moe_bsr.cli.main import main
from moe_bsr.config import ConfigError
from moe_bsr.evaluation import rejection as scores
from moe_bsr.runs import rejection

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bare):
    """Return one multitask run and one run with a model per task, both with fitted detectors."""
    folder = tmp_path_factory.mktemp("rejection")
    config = make_config(folder, **LATE, train__steps=3, train__evaluate_test=False)
    moe_bsr.train(config, folder / "one", callbacks=[])
    alone = make_config(folder, **LATE, mode="single_task", train__steps=2, train__evaluate_test=False)
    moe_bsr.train(alone, folder / "each", callbacks=[])
    return {name: (folder / name, moe_bsr.reject(folder / name)) for name in ("one", "each")}


@pytest.fixture
def copy(runs, tmp_path):
    return shutil.copytree(runs["one"][0], tmp_path / "run")


@pytest.mark.parametrize("kind", ["one", "each"])
def test_predict_agrees_with_the_measured_rejection_rates(runs, kind):
    folder, found = runs[kind]
    trained, tasks = moe_bsr.load(folder), ["shapes", "fractals"]
    predicted = {}
    for name in tasks:
        data = trained.data(name)
        images = [data.val.source.image(data.val.place(i)) for i in range(len(data.val))]
        predicted[name] = trained.predict(images)["images"]
        assert found["tasks"][name]["val_images"] == len(images)
    for task, other in (tasks, tasks[::-1]):
        own, others = ([image["margins"][task] for image in predicted[name]] for name in (task, other))
        about = found["tasks"][task]
        assert np.mean(np.array(own) >= -1e-3) >= scores.ACCEPTED
        pairs = [(a > b + 1e-4) + (abs(a - b) <= 1e-4) / 2 for a in own for b in others]
        assert about["auroc"] == pytest.approx(np.mean(pairs), abs=0.02)
        assert about["rejected"] == pytest.approx(np.mean(np.array(others) < 0), abs=1e-6)
        for image in predicted[task]:
            best = max(image["margins"], key=image["margins"].get)
            assert image["belongs_to"] == (best if image["margins"][best] >= 0 else None)
        foreign = np.mean([image["margins"][other] < 0 for image in predicted[task]])
        assert about["foreign"] == pytest.approx(foreign, abs=1e-6)


def test_the_score_with_the_highest_auroc_is_chosen_and_reported(runs):
    folder, found = runs["one"]
    assert found["score"] == max(found["mean_auroc"], key=found["mean_auroc"].get)
    assert set(found["mean_auroc"]) == set(scores.SCORES)
    written = json.loads((folder / "report.json").read_text())["rejection"]
    assert {"run": str(folder), "step": found["step"], **written} == json.loads(json.dumps(found))
    assert "AUROC against other tasks" in (folder / "report.md").read_text()
    report = moe_bsr.evaluate(folder)  # a run with the detector file can still be evaluated
    assert report["tasks"].keys() == {"shapes", "fractals"}


def test_class_statistics_are_computed_from_the_training_images(runs):
    folder, found = runs["one"]
    trained = moe_bsr.load(folder)
    data, model = trained.data("fractals"), trained.models["fractals"]
    arrays = [data.train.source.image(data.train.place(i)) for i in range(len(data.train))]
    pixels = torch.stack([trained.transforms.eval_image(Image.fromarray(array)) for array in arrays])
    with torch.inference_mode():
        tokens, _ = model.forward_features(trained.transforms.normalize(pixels), "fractals")
        features = model.features_from(tokens, "fractals")
    expected = scores.statistics(features, torch.from_numpy(data.train.labels))
    for name, tensor in rejection.load(trained)["fractals"].tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-3)
    assert found["tasks"]["fractals"]["train_images"] == len(data.train)


def test_detectors_of_other_weights_are_refused(copy):
    trained = moe_bsr.load(copy)
    with torch.no_grad():
        trained.models["shapes"].heads["shapes"].bias[0] += 1
    image = np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(ConfigError, match="made with other weights of shapes"):
        trained.predict(image, reject=True)
    with pytest.warns(UserWarning, match="nothing is rejected"):
        assert "belongs_to" not in trained.predict(image)["images"][0]
    assert "belongs_to" not in trained.predict(image, reject=False)["images"][0]


@pytest.mark.parametrize("harm", ["cut", "nan", "shape", "link", "gone"])
def test_a_damaged_file_is_refused_in_one_line(copy, harm):
    file = copy / rejection.FILE
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "link":
        shutil.move(file, copy / "elsewhere")
        file.symlink_to("elsewhere")
    elif harm == "gone":
        file.unlink()
    trained = moe_bsr.load(copy) if harm != "link" else None
    if harm in ("nan", "shape"):
        detectors = rejection.load(trained)
        name = next(iter(detectors["shapes"].tensors), None)
        if name is None:
            detectors["shapes"].threshold = float("nan")
        else:
            broken = detectors["shapes"].tensors[name]
            detectors["shapes"].tensors[name] = broken * float("nan") if harm == "nan" else broken[..., :-1]
        rejection._write(trained, detectors, {"tasks": {}, "mean_auroc": {}, "score": "x", "accepted": 1.0})
    with pytest.raises(ConfigError) as refused:
        (trained or moe_bsr.load(copy)).predict(np.zeros((9, 9, 3), np.uint8), reject=True)
    assert "\n" not in str(refused.value) and str(copy) in str(refused.value)


def test_the_reject_and_predict_commands(copy, capsys, tmp_path, monkeypatch):
    assert main(["reject", str(copy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(moe_bsr, "reject", lambda trained, **options: found)
    assert main(["reject", str(copy)]) == 0
    text = capsys.readouterr().out
    assert f"score: {found['score']}" in text and "others rejected" in text
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "black.png")
    assert main(["predict", str(copy), str(tmp_path / "black.png"), "--json"]) == 0
    image = json.loads(capsys.readouterr().out)["images"][0]
    assert main(["predict", str(copy), str(tmp_path / "black.png")]) == 0
    text = capsys.readouterr().out
    assert ("none of these tasks" in text) == (image["belongs_to"] is None)
    assert ("* " in text) == (image["belongs_to"] is not None)


def test_at_most_the_stated_number_of_training_images_is_used():
    data = task_data("few", labels=[0] * 14 + [1] * 8 + [2])
    chosen = rejection._thinned(data, 11).train
    assert np.bincount(chosen.labels).tolist() == [5, 5, 1] and len(set(chosen.index)) == 11
    assert len(rejection._thinned(data, 23).train) == 23
