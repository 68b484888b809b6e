"""tools/evaluate.py and tools/predict.py on a run that exists in memory alone."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_tasks import CLASSES, CPU, TRANSFORMS, decided_network, network, task_data

from moe_bsr.evaluation.evaluate import evaluate
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runs.load import chosen_tasks

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def model() -> MultitaskViT:
    return decided_network()


@pytest.fixture
def tools(model, monkeypatch):
    """tools/evaluate.py and tools/predict.py on a run that exists in memory alone."""
    counted = []
    loaded = SimpleNamespace(
        models=dict.fromkeys(CLASSES, model),
        data=task_data,
        transforms=TRANSFORMS,
        runtime=CPU,
        step=12,
        class_names={name: task_data(name).class_names for name in CLASSES},
    )

    def load(run, checkpoint="best", data_root=None, device=None, weights=None, tasks=None):
        chosen = {name: loaded.models[name] for name in chosen_tasks(tasks, list(loaded.models))}
        return SimpleNamespace(**vars(loaded) | {"models": chosen})

    programs = {}
    for name in ("evaluate", "predict"):
        spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
        programs[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(programs[name])
        monkeypatch.setattr(programs[name], "load", load)
    monkeypatch.setattr(
        programs["evaluate"], "count_test_evaluation", lambda run, tasks: counted.append((run, tasks)) or len(counted)
    )
    return SimpleNamespace(
        evaluate=programs["evaluate"].main, predict=programs["predict"].main, counted=counted, loaded=loaded
    )


def test_the_tool_gives_the_numbers_of_evaluate(tools, model, capsys):
    tools.evaluate(["RUN", "--json"])
    report = json.loads(capsys.readouterr().out)
    for name in CLASSES:
        direct = evaluate(model, task_data(name), "val", TRANSFORMS, CPU)
        assert report["tasks"][name] | {"images_per_second": 0} == direct | {"images_per_second": 0}
    assert report["mean_top1"] == pytest.approx((report["tasks"]["many"]["top1"] + report["tasks"]["few"]["top1"]) / 2)
    assert (report["step"], report["split"]) == (12, "val")
    assert tools.counted == []


def test_the_tool_counts_evaluations_of_the_test_split_once_each(tools, capsys):
    for count in (1, 2):
        tools.evaluate(["RUN", "--split", "test", "--task", "few"])
        out = capsys.readouterr().out
        assert f"test evaluation {count} of this run" in out and "many" not in out
    assert tools.counted == [(Path("RUN"), ["few"])] * 2


def test_predictions_are_those_of_the_whole_forward(tools, model, tmp_path, capsys, monkeypatch):
    paths = []
    for i in range(3):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(task_data("many").val.source.image(i)).save(paths[-1])
    stem_passes = []
    whole_stem = model.forward_features
    monkeypatch.setattr(model, "forward_features", lambda *a: stem_passes.append(1) or whole_stem(*a))
    tools.predict(["RUN", *paths, "--json", "--top", "5"])
    assert len(stem_passes) == 1
    monkeypatch.undo()
    report = json.loads(capsys.readouterr().out)
    assert report["stems"] == [{"tasks": ["many", "few"], "blocks": 4, "shared_blocks": 1}]
    images = torch.stack([TRANSFORMS.eval_image(Image.open(path)) for path in paths])
    for task, classes in CLASSES.items():
        with torch.no_grad():
            probabilities = model(TRANSFORMS.normalize(images), task).logits.softmax(1)
        for i, path in enumerate(paths):
            assert report["images"][i]["image"] == path
            names = report["images"][i]["tasks"][task]
            best = probabilities[i].argsort(descending=True)[:5].tolist()
            assert [n["name"] for n in names] == [f"class {c}" for c in best]
            assert len(names) == min(5, classes)
            found = [n["probability"] for n in names]
            assert found == pytest.approx(probabilities[i, best].tolist())


def test_predict_says_what_was_shared(tools, tmp_path, capsys):
    path = str(tmp_path / "image.png")
    Image.new("RGB", (20, 30)).save(path)
    tools.predict(["RUN", path])
    assert "1 of 4 blocks ran once for all of them, 3 once for each task" in capsys.readouterr().out
    tools.loaded.models["few"] = network({"few": 3}, depth=2, train_blocks=[1], drop_blocks=[], moe_blocks=[])
    tools.predict(["RUN", path])
    assert "ran once" not in capsys.readouterr().out
    torch.manual_seed(0)  # a model of its own over the same frozen blocks
    tools.loaded.models["few"] = network(
        {"few": 3}, depth=4, train_blocks=[1, 3], drop_blocks=[0, 2], moe_blocks=[1, 3]
    )
    tools.predict(["RUN", path])
    assert "1 of 4 blocks ran once for all of them, 3 once for each task" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "bad.png: no such file"),
        (b"", "bad.png: not a readable image"),
        (b"no image", "bad.png: not a readable image"),
    ],
)
def test_predict_names_an_unreadable_image_and_goes_on_with_the_others(tools, tmp_path, capsys, content, words):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (20, 20)).save(good)
    if content is not None:
        bad.write_bytes(content)
    tools.predict(["RUN", str(good), "--json"])
    alone = json.loads(capsys.readouterr().out)
    for images, expected in (([bad, good], alone), ([bad], alone | {"images": []})):
        with pytest.raises(SystemExit) as stopped:
            tools.predict(["RUN", *map(str, images), "--json"])
        captured = capsys.readouterr()
        assert stopped.value.code == 1 and words in captured.err and len(captured.err.splitlines()) == 1
        assert json.loads(captured.out) == expected
    with pytest.raises(SystemExit, match="1"):
        tools.predict(["RUN", str(bad)])
    assert capsys.readouterr().out == ""


def test_the_tool_refuses_an_unknown_task(tools, capsys):
    with pytest.raises(SystemExit) as stopped:
        tools.evaluate(["RUN", "--task", "mani", "--split", "test"])
    assert stopped.value.code == 2 and "did you mean many" in capsys.readouterr().err
    assert tools.counted == []
