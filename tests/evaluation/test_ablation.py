"""Expert ablation against a full forward pass with the logit masked by hand."""

import numpy as np
import pytest
import torch
from tiny_decided import PIPELINE, decided, make_data
from tiny_models import CLASSES, make_vit, normal
from tiny_tasks import CPU

from moe_bsr.config import Config, MoEConfig, PlanConfig
from moe_bsr.evaluation.ablation import Ablation, ablate
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.visualize import experts as expert_figures
from moe_bsr.visualize import theme


def by_hand(model, data, index: int, expert: int) -> np.ndarray:
    """Return the predictions for all images from full forward passes whose router never selects `expert`."""
    router = model.vit.blocks[index].mlp.router
    route = router.forward

    def without(x, task):
        logits = route(x, task)
        logits[:, expert] = -torch.inf
        return logits

    router.forward = without
    with torch.inference_mode():
        images, _ = next(PIPELINE.eval_batches(data, "val", 100))
        found = model(PIPELINE.normalize(images), data.name).logits.argmax(1)
    router.forward = route
    return found.numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": "task_conditioned", "renormalize_gates": False},
        {"kind": "registers", "top_k": 1, "renormalize_gates": False},
        {"top_k": 4},
        {"kind": "average-pool", "drop_blocks": [0, 1, 2], "train_blocks": "all", "moe_blocks": [0, 1, 2, 3]},
    ],
    ids=["plain", "conditioned-raw", "registers-top1", "all-chosen", "every-block"],
)
def test_ablation_equals_full_forward_passes_with_a_masked_logit(options):
    model = decided(**{"moe_blocks": [1, 3]} | options)
    datasets = {task: make_data(task, count) for task, count in (("one", 11), ("two", 7))}
    found = ablate(model, datasets, PIPELINE, CPU, batch_size=4)
    assert list(found) == model.balance.blocks
    changed = 0
    for row, (task, data) in enumerate(datasets.items()):
        with torch.inference_mode():
            whole = next(PIPELINE.eval_batches(data, "val", 100))[0]
            right = model(PIPELINE.normalize(whole), task).logits.argmax(1).numpy() == data.val.labels
        for index, result in found.items():
            assert result.tasks == ["one", "two"] and result.images[row] == len(data.val)
            assert result.right[row] == right.sum()
            for expert in range(4):
                still = by_hand(model, data, index, expert) == data.val.labels
                assert result.lost[row, expert] == (right & ~still).sum()
                assert result.gained[row, expert] == (~right & still).sum()
                changed += (right != still).sum()
    assert changed > 0  # otherwise the test would compare nothing


def test_the_model_is_left_as_it_was():
    model, data = decided(moe_blocks=[3]), make_data("one", 5)
    images = normal(2, 3, 16, 16)
    with torch.inference_mode():
        before = model(images, "one").logits
        ablate(model, {"one": data}, PIPELINE, CPU)
        assert torch.equal(model(images, "one").logits, before)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {
            "plan": PlanConfig(train_blocks=[3], drop_blocks=[], moe_blocks=[3]),
            "moe": MoEConfig(num_experts=1, top_k=1),
        },
    ],
    ids=["dense", "lone expert"],
)
def test_ablation_is_empty_without_experts_or_with_a_single_expert(config):
    dense = {"plan": PlanConfig(train_blocks=[3], drop_blocks=[], moe_blocks=[])}
    model = MultitaskViT(make_vit(), Config(**dense | config), CLASSES).eval()
    assert ablate(model, {"one": make_data("one", 3)}, PIPELINE, CPU) == {}


def test_lost_points_and_their_significance():
    found = Ablation(
        ["a", "b"],
        np.array([200, 50]),
        np.array([150, 20]),
        lost=np.array([[20, 0, 3], [1, 0, 9]]),
        gained=np.array([[2, 4, 3], [6, 0, 1]]),
    )
    assert found.points().tolist() == [[9, -2, 0], [-10, 0, 16]]
    assert found.clear().tolist() == [[True, False, False], [False, False, True]]  # 4 of 4 coin tosses: p = 0.125


@pytest.mark.parametrize("tasks, experts", [(1, 2), (3, 16), (20, 64)])
def test_the_figure_has_a_cell_for_every_expert_and_numbers_if_they_fit(tasks, experts):
    lost = np.arange(tasks * experts).reshape(tasks, experts) % 7
    names, images = [f"task{i}" for i in range(tasks)], np.full(tasks, 100)
    result = Ablation(names, images, images // 2, lost, 0 * lost)
    figure = expert_figures.ablation(result, 3, "validation")
    assert figure.axes[0].images[0].get_array().shape == (tasks, experts, 3)
    assert theme.numbers(figure) == ([f"{value:.1f}" for value in lost.flat] if experts <= 16 else [])
