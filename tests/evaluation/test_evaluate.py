"""Evaluation: each number against a slow, obvious reference; the tools on a model in memory."""

import contextlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from timm.models.vision_transformer import VisionTransformer

from moe_bsr import config as configuration
from moe_bsr.data import ImageTransforms, Split, TaskData, TaskSpec
from moe_bsr.evaluation.evaluate import (
    TokenAndExpertUsage,
    calibration_error,
    chosen_tasks,
    evaluate,
    judge,
    largest_confusions,
    summarize,
    table,
    wilson_interval,
)
from moe_bsr.model.multitask import MultitaskViT

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CPU = SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext)
CLASSES = {"many": 7, "few": 3}


class Noise:
    """Random images of different sizes."""

    def __init__(self, labels, classes: int, seed: int) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = [f"class {i}" for i in range(classes)]
        self.seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, i))
        return rng.integers(0, 256, (16 + i % 3, 16 + i % 5, 3), dtype=np.uint8)


def task_data(name: str, labels=None) -> TaskData:
    classes = CLASSES[name]
    source = Noise(np.arange(23) % classes if labels is None else labels, classes, classes)
    split = Split(source, np.arange(len(source)), source.labels)
    spec = TaskSpec(name=name, title=name, source="folder", path="nowhere")
    return TaskData(
        name=name,
        title=name,
        class_names=source.class_names,
        train=split,
        val=split,
        test=split,
        origin="drawn",
        spec=spec,
    )


def network(classes: dict[str, int], depth: int, **plan) -> MultitaskViT:
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=depth, num_heads=2, num_classes=0)
    config = {"tasks": list(classes), "plan": plan, "moe": {"num_experts": 6, "top_k": 2}}
    return MultitaskViT(vit, configuration.from_dict(config), classes)


@pytest.fixture(scope="module")
def model() -> MultitaskViT:
    torch.manual_seed(0)
    built = network(CLASSES, depth=4, train_blocks=[1, 3], drop_blocks=[0, 2], moe_blocks=[1, 3])
    for head in built.heads.values():  # far from uniform answers
        torch.nn.init.normal_(head.weight)
    return built


@pytest.fixture(scope="module")
def transforms() -> ImageTransforms:
    return ImageTransforms(size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)


def random_judged(n: int = 200, classes: int = 9, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that many rows hold ties at the top and at the fifth place.
    logits = torch.randint(-3, 4, (n, classes), generator=generator).float()
    return logits, torch.randint(0, classes, (n,), generator=generator)


def test_top_k_with_ties_equals_sorting_each_row():
    logits, labels = random_judged()
    judged = judge(logits, labels)
    for row, label, rank, predicted in zip(logits, labels, judged.rank, judged.predicted):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        assert order.index(label) == rank
        assert order[0] == predicted


def test_all_logits_equal_is_not_a_success():
    judged = judge(torch.zeros(10, 10), torch.arange(10))
    assert summarize(judged, list("abcdefghij"))["top1"] == pytest.approx(10.0)
    assert summarize(judged, list("abcdefghij"))["top5"] == pytest.approx(50.0)


def test_loss_and_confidence_equal_the_definition():
    logits, labels = random_judged()
    judged = judge(logits, labels)
    exponentials = np.exp(logits.numpy().astype(np.float64))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    np.testing.assert_allclose(judged.confidence, probabilities.max(1), rtol=1e-12)
    own = probabilities[np.arange(200), labels]
    np.testing.assert_allclose(judged.loss, -np.log(own), rtol=1e-12)


def test_calibration_error_equals_a_loop_over_bins():
    rng = np.random.default_rng(0)
    edges = np.arange(1, 16) / 15
    confidence = np.concatenate([rng.random(500), np.repeat(edges, 20), [1e-9]])
    # The gap changes its sign from bin to bin, so that merged or shifted bins would cancel it.
    right = np.ceil(confidence * 15 - 1e-6) % 2 == 0
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, right) == pytest.approx(expected, rel=1e-12)
    assert calibration_error(np.ones(4), np.ones(4, dtype=bool)) == 0.0
    assert calibration_error(np.ones(4), np.zeros(4, dtype=bool)) == 1.0


@pytest.mark.parametrize("hits, n", [(0, 1), (1, 1), (0, 30), (30, 30), (7, 10), (912, 1000)])
def test_wilson_interval_equals_scipy(hits, n):
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0.0 <= wilson_interval(hits, n)[0] <= hits / n <= wilson_interval(hits, n)[1] <= 1.0


def test_confusions_equal_a_count_of_pairs():
    label = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 3])
    predicted = np.array([1, 1, 2, 0, 0, 1, 1, 1, 2, 0])
    found = largest_confusions(label, predicted, list("abcd"), limit=4)
    assert [(c["true"], c["predicted"], c["count"], c["share"]) for c in found] == [
        ("a", "b", 2, 0.5),
        ("c", "b", 2, 2 / 3),
        ("a", "c", 1, 0.25),
        ("b", "a", 1, 0.5),
    ]
    assert largest_confusions(label, label, list("abcd")) == []


def test_classes_missing_in_the_split_do_not_count_as_wrong():
    logits = torch.tensor([[3.0, 0, 0, 0], [3.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 0, 3.0]])
    result = summarize(judge(logits, torch.tensor([0, 0, 0, 3])), list("abcd"))
    assert result["mean_class_accuracy"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert result["top1"] == pytest.approx(75.0)
    assert result["chance"] == pytest.approx(75.0)


def test_one_class_alone_is_certain():
    result = summarize(judge(torch.randn(5, 1), torch.zeros(5, dtype=torch.int64)), ["only"])
    assert (result["top1"], result["top5"], result["chance"], result["ece"]) == (100, 100, 100, 0)
    assert result["loss"] == 0.0 and result["confusions"] == []


def test_evaluation_equals_a_plain_loop_over_images(model, transforms):
    data = task_data("many")
    result = evaluate(model, data, "val", transforms, CPU, batch_size=4)
    hits, losses, patches, loads = 0, [], [], {1: np.zeros(6), 3: np.zeros(6)}
    model.eval()
    with torch.no_grad():
        for i in range(len(data.val)):
            image = transforms.eval_image(Image.fromarray(data.val.source.image(i)))
            output = model(transforms.normalize(image[None]), "many")
            probabilities = output.logits[0].double().softmax(0).numpy()
            hits += probabilities.argmax() == data.val.labels[i]
            losses.append(-np.log(probabilities[data.val.labels[i]]))
            patches.append([sum(p >= 0 for p in output.records[b].dropped.origin[0].tolist()) / 16 for b in (0, 2)])
            for block, load in loads.items():
                for expert in output.routing[block].experts.flatten().tolist():
                    load[expert] += 1
    assert result["top1"] == pytest.approx(100 * hits / 23)
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert list(result["tokens_kept_after"]) == ["0", "2"]
    assert list(result["tokens_kept_after"].values()) == pytest.approx(np.mean(patches, 0))
    assert result["tokens_kept"] == result["tokens_kept_after"]["2"]
    for block, load in loads.items():
        np.testing.assert_allclose(result["expert_share"][str(block)], load / load.sum())
        assert result["experts_used"][str(block)] == (load / load.sum() >= 0.01).sum()


def test_evaluation_is_repeatable_and_plain_json(model, transforms):
    runs = [evaluate(model, task_data("many"), "test", transforms, CPU) for _ in range(2)]
    assert all(run.pop("images_per_second") > 0 for run in runs)
    assert runs[0] == runs[1] == json.loads(json.dumps(runs[0], allow_nan=False))


def test_batch_size_changes_only_rounding(model, transforms):
    reference, *others = (evaluate(model, task_data("many"), "val", transforms, CPU, size) for size in (64, 1, 5, 23))
    for other in others:
        for key in ("loss", "ece"):
            assert other.pop(key) == pytest.approx(reference[key], rel=1e-4)
        other.pop("images_per_second")
        assert other == {key: reference[key] for key in other}


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(model, transforms, training):
    model.train(training)
    evaluate(model, task_data("few"), "val", transforms, CPU)
    assert model.training is training and model.vit.blocks[3].mlp.training is training
    with torch.no_grad():
        kept = model.heads["few"].bias.clone()
        model.heads["few"].bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="few"):
        evaluate(model, task_data("few"), "val", transforms, CPU)
    assert model.training is training
    with torch.no_grad():
        model.heads["few"].bias.copy_(kept)


def test_training_goes_on_after_an_evaluation(model, transforms):
    evaluate(model, task_data("few"), "val", transforms, CPU)
    model.train()(torch.randn(2, 3, 16, 16), "few").logits.sum().backward()
    assert model.heads["few"].weight.grad is not None
    model.zero_grad()


def test_gate_noise_is_off_in_evaluation(model, transforms):
    data = task_data("few")
    reference = evaluate(model, data, "val", transforms, CPU)
    moes = [model.vit.blocks[i].mlp for i in (1, 3)]
    for moe in moes:
        moe.noise_std = 5.0
    noisy = evaluate(model.train(), data, "val", transforms, CPU)
    for moe in moes:
        moe.noise_std = 0.0
    assert noisy | {"images_per_second": 0} == reference | {"images_per_second": 0}


def test_a_plain_network_keeps_all_and_has_no_experts(transforms):
    plain = network({"few": 3}, depth=2, train_blocks=[], drop_blocks=[], moe_blocks=[])
    result = evaluate(plain, task_data("few"), "val", transforms, CPU)
    assert (result["tokens_kept"], result["tokens_kept_after"]) == (1.0, {})
    assert (result["experts_used"], result["expert_share"]) == ({}, {})
    assert "100.0 %" in table({"few": result}) and "mean" not in table({"few": result})


def test_many_experts_evenly_used_all_count_as_used():
    activity = TokenAndExpertUsage()
    activity.add({5: SimpleNamespace(dropped=None, routing=SimpleNamespace(load=torch.ones(200)))})
    assert activity.summary()["experts_used"] == {"5": 200}


def test_wrong_data_and_empty_splits_are_refused(model, transforms):
    with pytest.raises(ValueError, match="few.*val split has no images"):
        evaluate(model, task_data("few", labels=[]), "val", transforms, CPU)
    data = task_data("few")
    data.class_names.append("one more")
    with pytest.raises(ValueError, match="few.*4 classes.*head 3"):
        evaluate(model, data, "val", transforms, CPU)


def test_the_table_has_a_row_for_each_task_their_mean_and_confusions(model, transforms):
    results = {name: evaluate(model, task_data(name), "val", transforms, CPU) for name in CLASSES}
    lines = table(results).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["task", "many", "few", "mean"]
    assert f"{(results['many']['top1'] + results['few']['top1']) / 2:.1f}" in lines[3]
    assert "of 6" in lines[1] and f"{results['many']['top1_low']:.1f} - " in lines[1]
    worst = results["many"]["confusions"][0]
    assert f"{worst['true']} -> {worst['predicted']} {worst['count']}x" in lines[-2]


def test_tasks_are_chosen_by_name():
    assert chosen_tasks(None, ["a", "b"]) == ["a", "b"]
    assert chosen_tasks(["b", "b"], ["a", "b"]) == ["b"]
    with pytest.raises(ValueError, match="petls: this run has pets, food101; did you mean pets"):
        chosen_tasks(["petls"], ["pets", "food101"])


@pytest.fixture
def tools(model, transforms, monkeypatch):
    """tools/evaluate.py and tools/predict.py on a run that exists in memory alone."""
    counted = []
    loaded = SimpleNamespace(
        models=dict.fromkeys(CLASSES, model),
        data=task_data,
        transforms=transforms,
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


def test_the_tool_gives_the_numbers_of_evaluate(tools, model, transforms, capsys):
    tools.evaluate(["RUN", "--json"])
    report = json.loads(capsys.readouterr().out)
    for name in CLASSES:
        direct = evaluate(model, task_data(name), "val", transforms, CPU)
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


def test_predictions_are_those_of_the_whole_forward(tools, model, transforms, tmp_path, capsys, monkeypatch):
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
    images = torch.stack([transforms.eval_image(Image.open(path)) for path in paths])
    for task, classes in CLASSES.items():
        with torch.no_grad():
            probabilities = model(transforms.normalize(images), task).logits.softmax(1)
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
