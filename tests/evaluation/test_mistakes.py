"""Mistakes against a loop over the images."""

import dataclasses

import numpy as np
import torch
from tiny_tasks import CPU, TRANSFORMS, decided_network, task_data

from moe_bsr.data.task import Split
from moe_bsr.evaluation.mistakes import find_mistakes


def answers(model, data) -> list:
    """Return (image, log-probabilities) of every validation image."""
    found = []
    for images, _ in TRANSFORMS.eval_batches(data, "val", 1):
        with torch.inference_mode():
            logits = model(TRANSFORMS.normalize(images), data.name).logits[0]
        found.append((images[0].numpy(), logits.double().log_softmax(0)))
    return found


def test_counts_and_the_worst_answers_equal_a_loop_over_images():
    model, data = decided_network().eval(), task_data("many")
    found = find_mistakes(model, data, TRANSFORMS, CPU, worst=3, batch_size=5)
    counts, wrong = np.zeros((7, 7), int), []
    for label, (image, scores) in zip(data.val.labels, answers(model, data), strict=True):
        answer = int(scores.argmax())
        counts[label, answer] += 1
        if label != answer:
            wrong.append((-float(scores[label]), label, answer, float(scores.max().exp()), image))
    assert (found.counts == counts).all() and len(wrong) > 3
    wrong.sort(key=lambda each: -each[0])
    assert len(found.worst) == 3
    for mistake, (loss, label, answer, confidence, image) in zip(found.worst, wrong, strict=False):
        assert (mistake.true, mistake.predicted) == (f"class {label}", f"class {answer}")
        assert np.allclose([mistake.loss, mistake.confidence], [loss, confidence], rtol=1e-4)
        assert np.array_equal(mistake.image, image)


def test_without_mistakes_there_are_no_worst_answers():
    model, data = decided_network().eval(), task_data("few")
    labels = np.array([int(scores.argmax()) for _, scores in answers(model, data)])
    named = dataclasses.replace(data, val=Split(data.val.source, data.val.index, labels))
    found = find_mistakes(model, named, TRANSFORMS, CPU, worst=3)
    assert found.worst == [] and found.counts.sum() == found.counts.trace() == 23
