"""Accuracy without the experts or the routers' choices, against models that are changed by hand."""

import numpy as np
import pytest
import torch
from tiny_decided import PIPELINE, decided, make_data
from tiny_models import CLASSES, make_model, normal
from tiny_tasks import CPU

from moe_bsr.evaluation.ablation import Ablation
from moe_bsr.evaluation.interventions import KINDS, changed, intervene
from moe_bsr.visualize import interventions as views

IMAGES = normal(3, 3, 16, 16)


def logits(model, task="one"):
    with torch.inference_mode():
        return model(IMAGES, task).logits


def experts_of(model):
    return [model.vit.blocks[index].mlp.experts for index in model.balance.blocks]


def test_merging_replaces_experts_by_their_mean():
    model = decided(moe_blocks=[1, 3])
    with changed(model, "merged"):
        merged = logits(model)
    for experts in experts_of(model):
        for parameter in experts.parameters():
            parameter.data = parameter.data.mean(0, keepdim=True).expand_as(parameter).contiguous()
    assert torch.allclose(logits(model), merged, atol=1e-4)


def test_merged_expert_slices_equal_the_original_ffn():
    model, dense = (make_model("class-token", moe_blocks=blocks, mlp_ratio=1).eval() for blocks in ([1, 3], []))
    assert not torch.allclose(logits(model), logits(dense), atol=1e-4)
    with changed(model, "merged"):
        assert torch.allclose(logits(model), logits(dense), atol=1e-4)


@pytest.mark.parametrize("router", ["per_task", "task_conditioned"])
def test_swapping_routes_a_task_like_the_next_one(router):
    model = decided(moe_blocks=[1, 3], router=router)
    following = list(CLASSES)[1]
    with changed(model, "swapped"):
        swapped = logits(model)
    routes = [model.vit.blocks[index].mlp.router for index in model.balance.blocks]
    for route in routes:
        route.forward = lambda x, task, forward=route.forward: forward(x, following)
    assert torch.allclose(logits(model), swapped, atol=1e-5) and not torch.equal(swapped, logits(decided(), "one"))


def test_shuffling_permutes_the_choices_among_tokens():
    model, seen = decided(moe_blocks=[3]), []
    layer = model.vit.blocks[3].mlp
    forward = layer.experts.forward
    layer.experts.forward = lambda x, gates, chosen, *rest: seen.append(chosen) or forward(x, gates, chosen, *rest)
    plain = logits(model)
    with changed(model, "shuffled"):
        assert not torch.allclose(logits(model), plain, atol=1e-4)
    before, after = (np.array(sorted(map(tuple, chosen.tolist()))) for chosen in seen)
    assert (before == after).all() and not torch.equal(*seen)


def test_counts_equal_full_forward_passes_and_the_model_is_unchanged():
    model, plain = decided(moe_blocks=[1, 3]), logits(decided(moe_blocks=[1, 3]))
    datasets = {"one": make_data("one", 11), "two": make_data("two", 7)}
    found = intervene(model, datasets, PIPELINE, CPU, batch_size=100)
    assert torch.equal(logits(model), plain)
    for row, (task, data) in enumerate(datasets.items()):
        images = PIPELINE.normalize(next(PIPELINE.eval_batches(data, "val", 100))[0])
        with torch.inference_mode():
            right = model(images, task).logits.argmax(1).numpy() == data.val.labels
            for column, kind in enumerate(KINDS):
                with changed(model, kind):
                    still = model(images, task).logits.argmax(1).numpy() == data.val.labels
                assert found.lost[row, column] == (right & ~still).sum()
                assert found.gained[row, column] == (~right & still).sum()
        assert (found.images[row], found.right[row]) == (len(data.val), right.sum())
    assert (found.lost + found.gained).sum() > 0


@pytest.mark.parametrize("options", [{"moe_blocks": []}, {"moe_blocks": [3], "num_experts": 1, "top_k": 1}])
def test_there_is_no_result_without_a_choice_of_experts(options):
    model = make_model("class-token", **options).eval()
    assert intervene(model, {"one": make_data("one", 3)}, PIPELINE, CPU) is None


def result(lost, gained, tasks=2):
    images = np.full(tasks, 400)
    return Ablation([f"task{i}" for i in range(tasks)], images, images // 2, np.array(lost), np.array(gained))


@pytest.mark.parametrize(
    ("lost", "gained", "verdict"),
    [
        ([[40, 8, 20], [30, 2, 9]], [[4, 6, 2], [2, 3, 1]], "Routing matters."),
        ([[6, 8, 20], [5, 2, 9]], [[4, 6, 2], [4, 3, 1]], "The mixture acts as one FFN."),
    ],
)
def test_verdict_and_confidence_intervals(lost, gained, verdict):
    found = result(lost, gained)
    points, half = views.mean_points(found)
    pairs = zip(np.ravel(lost), np.ravel(gained), strict=True)
    differences = [[1] * a + [-1] * b + [0] * (400 - a - b) for a, b in pairs]
    by_task = np.array(differences, float).reshape(2, 3, 400)
    assert points == pytest.approx(100 * by_task.mean(2).mean(0))
    assert half == pytest.approx(100 * 1.96 * np.sqrt((by_task.var(2) / 400).sum(0)) / 2, rel=1e-3)
    said = views.claim(found)
    assert said.verdict == verdict and said.notable == (verdict == "Routing matters.")
    assert f"{points[0]:+.1f} ± {half[0]:.1f}" in said.reasons
    rows = views.section(found).tables[0].rows
    assert [row[0] for row in rows[1:]] == ["task0", "task1", "mean"] and len(rows[0]) == 6


def test_a_single_task_has_no_router_to_swap():
    found = result([[40, 0, 20]], [[4, 0, 2]], tasks=1)
    assert "router" not in views.claim(found).reasons and len(views.section(found).tables[0].rows[0]) == 5
