"""Evaluation against a plain loop over images, its lack of side effects, and invalid input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_routing import spread
from tiny_tasks import CPU, TRANSFORMS, decided_network, network, task_data

from moe_bsr.evaluation.evaluate import evaluate
from moe_bsr.evaluation.tables import table
from moe_bsr.evaluation.usage import TokenAndExpertUsage
from moe_bsr.model.block import Record
from moe_bsr.model.multitask import MultitaskViT


@pytest.fixture(scope="module")
def model() -> MultitaskViT:
    return decided_network()


def test_evaluation_equals_a_plain_loop_over_images(model):
    data = task_data("many")
    result = evaluate(model, data, "val", TRANSFORMS, CPU, batch_size=4)
    hits, losses, patches, loads = 0, [], [], {1: np.zeros(6), 3: np.zeros(6)}
    model.eval()
    with torch.no_grad():
        for i in range(len(data.val)):
            image = TRANSFORMS.eval_image(Image.fromarray(data.val.source.image(i)))
            output = model(TRANSFORMS.normalize(image[None]), "many")
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


def test_evaluation_is_repeatable_and_plain_json(model):
    runs = [evaluate(model, task_data("many"), "test", TRANSFORMS, CPU) for _ in range(2)]
    assert all(run.pop("images_per_second") > 0 for run in runs)
    assert runs[0] == runs[1] == json.loads(json.dumps(runs[0], allow_nan=False))


def test_batch_size_changes_only_rounding(model):
    reference, *others = (evaluate(model, task_data("many"), "val", TRANSFORMS, CPU, size) for size in (64, 1, 5, 23))
    for other in others:
        for key in ("loss", "ece"):
            assert other.pop(key) == pytest.approx(reference[key], rel=1e-4)
        other.pop("images_per_second")
        assert other == {key: reference[key] for key in other}


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(model, training):
    model.train(training)
    evaluate(model, task_data("few"), "val", TRANSFORMS, CPU)
    assert model.training is training and model.vit.blocks[3].mlp.training is training
    with torch.no_grad():
        kept = model.heads["few"].bias.clone()
        model.heads["few"].bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="few"):
        evaluate(model, task_data("few"), "val", TRANSFORMS, CPU)
    assert model.training is training
    with torch.no_grad():
        model.heads["few"].bias.copy_(kept)


def test_training_works_after_an_evaluation(model):
    evaluate(model, task_data("few"), "val", TRANSFORMS, CPU)
    model.train()(torch.randn(2, 3, 16, 16), "few").logits.sum().backward()
    assert model.heads["few"].weight.grad is not None
    model.zero_grad()


def test_gate_noise_is_off_in_evaluation(model):
    data = task_data("few")
    reference = evaluate(model, data, "val", TRANSFORMS, CPU)
    moes = [model.vit.blocks[i].mlp for i in (1, 3)]
    for moe in moes:
        moe.noise_std = 5.0
    noisy = evaluate(model.train(), data, "val", TRANSFORMS, CPU)
    for moe in moes:
        moe.noise_std = 0.0
    assert noisy | {"images_per_second": 0} == reference | {"images_per_second": 0}


def test_a_plain_network_keeps_all_tokens_and_has_no_experts():
    plain = network({"few": 3}, depth=2, train_blocks=[], drop_blocks=[], moe_blocks=[])
    result = evaluate(plain, task_data("few"), "val", TRANSFORMS, CPU)
    assert (result["tokens_kept"], result["tokens_kept_after"]) == (1.0, {})
    assert (result["experts_used"], result["expert_share"]) == ({}, {})
    assert "100.0 %" in table({"few": result}) and "mean" not in table({"few": result})


def test_many_evenly_used_experts_all_count_as_used():
    usage = TokenAndExpertUsage("few")
    usage.add({5: Record(routing=spread(200, list(range(200)), rounds=1))})
    assert usage.summary()["experts_used"] == {"5": 200}


def test_a_wrong_number_of_classes_and_empty_splits_are_refused(model):
    with pytest.raises(ValueError, match="few.*val split has no images"):
        evaluate(model, task_data("few", labels=[]), "val", TRANSFORMS, CPU)
    data = task_data("few")
    data.class_names.append("one more")
    with pytest.raises(ValueError, match="few.*4 classes.*head 3"):
        evaluate(model, data, "val", TRANSFORMS, CPU)
