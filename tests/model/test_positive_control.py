"""Two tasks with one shared head and conflicting labels: y and y + 1 on the same images.

Without experts both tasks get the same prediction, so no training raises their mean accuracy above one half. Routers
and gates depend on the task: if they work, the accuracy is higher.
"""

import pytest
import torch
from tiny_models import make_model, normal, scale_routers
from torch.nn import functional as F

CLASSES = 3
LABELS = torch.arange(24) % CLASSES
IMAGES = normal(CLASSES, 3, 16, 16, seed=1)[LABELS] + 0.3 * normal(24, 3, 16, 16)
OF_TASK = {"one": LABELS, "two": (LABELS + 1) % CLASSES}


def mean_accuracy(updates: int = 30, **options) -> float:
    model = make_model(train_blocks=(2, 3), drop_blocks=(), classes=dict.fromkeys(OF_TASK, CLASSES), **options)
    model.heads["two"] = model.heads["one"]
    scale_routers(model, 20.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(updates):
        for task, labels in OF_TASK.items():
            F.cross_entropy(model(IMAGES, task).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        correct = [model(IMAGES, task).logits.argmax(1) == labels for task, labels in OF_TASK.items()]
    return float(torch.cat(correct).float().mean())


def test_without_experts_the_mean_accuracy_is_at_most_half():
    assert mean_accuracy() <= 0.5


@pytest.mark.parametrize(
    "options", [{}, {"experts": "low_rank", "rank": 4}, {"experts": "low_rank", "rank": 4, "gate": "task"}]
)
def test_routers_and_gates_separate_the_tasks(options):
    assert mean_accuracy(moe_blocks=(2, 3), balance_loss="none", **options) > 0.75
