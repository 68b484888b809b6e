"""Features of a split: one row per image, in the order of evaluation."""

import pytest
import torch
from tiny_tasks import CPU, TRANSFORMS, decided_network, task_data

from moe_bsr.evaluation.evaluate import predict
from moe_bsr.evaluation.features import split_features


def test_a_head_on_the_features_predicts_what_the_model_predicts():
    model, data = decided_network().eval(), task_data("many")

    def make(images):
        tokens = model.forward_features(images, "many")[0]
        for index in range(model.path_start, len(model.plan)):
            tokens = model.run_block(index, tokens, "many")
        return model.features(tokens)

    found = split_features(make, data, "val", TRANSFORMS, CPU, batch_size=5)  # the last batch is smaller
    answers = model.heads["many"](found.x).argmax(1)
    expected = predict(model, data, "val", TRANSFORMS, CPU)
    assert answers.tolist() == expected.predicted.tolist() and found.labels.tolist() == expected.label.tolist()
    assert not found.x.requires_grad and torch.clone(found.x).requires_grad_().sum().backward() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad):
    with pytest.raises(FloatingPointError, match="task few"):
        split_features(lambda images: torch.full((len(images), 2), bad), task_data("few"), "val", TRANSFORMS, CPU)


def test_a_split_without_images_is_refused():
    empty = task_data("few", labels=[])
    with pytest.raises(ValueError, match="task few: its val split"):
        split_features(lambda images: images, empty, "val", TRANSFORMS, CPU)
