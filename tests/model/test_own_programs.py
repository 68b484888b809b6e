"""What programs do with a model besides training it here: pickle it, unfreeze parts, differentiate its images."""

import pickle

import pytest
import torch
from tiny_models import make_model, normal


@pytest.mark.parametrize("storage", ["exact", "recompute"])
def test_images_get_a_gradient_through_frozen_blocks(storage):
    found = []
    for trained in ((), "all"):
        images = normal(2, 3, 16, 16).requires_grad_()
        model = make_model(train_blocks=trained, storage=storage)
        model(images, "one").logits.square().sum().backward()
        found.append(images.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["pos_embed", "blocks.0.norm1.weight"])
def test_parameters_unfrozen_before_the_gradient_path_are_refused(name):
    model, images = make_model(train_blocks=(1, 3)), normal(2, 3, 16, 16)
    model.vit.get_parameter(name).requires_grad_(True)
    with pytest.raises(RuntimeError, match=rf"^vit\.{name} requires a gradient, but .* plan.train_blocks"):
        model(images, "one")
    with torch.no_grad():
        model(images, "one")


@pytest.mark.parametrize("experts", [(), (1,)], ids=["dense", "experts"])
def test_an_unknown_task_is_named_with_the_known_ones(experts):
    model = make_model(moe_blocks=experts)
    with pytest.raises(ValueError, match="^no task 'four': this model has one, two, three$"):
        model(normal(1, 3, 16, 16), "four")


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_pickled_model_computes_the_same(adapter):
    model, images = make_model(adapter=adapter, storage="int8"), normal(2, 3, 16, 16)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(images, "one").logits, model(images, "one").logits)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
