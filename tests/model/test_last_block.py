"""A last block that computes only the class token, against the same block with all tokens."""

from dataclasses import replace

import pytest
import torch
from tiny_models import gradients, make_model, normal
from torch.nn import functional as F

IMAGES, LABELS = normal(3, 3, 16, 16), torch.tensor([1, 4, 0])
LORA = {"kind": "lora", "layers": ["attn.qkv", "mlp.fc1"]}


def compute_all_tokens(model):
    model.contexts[-1] = replace(model.contexts[-1], class_token_alone=False)
    return model


def outcome(model):
    """Return logits, gradients, and the number of tokens after the last block."""
    tokens, _ = model.forward_features(IMAGES, "two", upto=model.path_start)
    for index in range(model.path_start, len(model.plan)):
        tokens = model.run_block(index, tokens, "two")
    logits = model.logits(tokens, "two")
    F.cross_entropy(logits, LABELS).backward()
    return logits.detach(), gradients(model), tokens.x.shape[1]


@pytest.mark.parametrize(
    "kind, options",
    [
        ("class-token", {}),
        ("class-token", {"train_blocks": "all", "drop_blocks": ()}),
        ("class-token", {"train_blocks": (1,)}),
        ("class-token", {"train_blocks": (1,), "storage": "recompute", "adapter": "adaptformer"}),
        ("class-token", {"storage": "segments", "adapter": LORA}),
        ("registers", {"train_blocks": "all"}),
        ("qk-norm", {"storage": "segments"}),
        ("layer-scale", {"storage": "recompute"}),
        ("no-bias", {}),
        ("scaled-attention-norm", {}),
    ],
)
def test_logits_and_gradients_are_those_of_all_tokens(kernels, kind, options):
    logits, grads, left = outcome(make_model(kind, **options))
    expected, expected_grads, all_tokens = outcome(compute_all_tokens(make_model(kind, **options)))
    assert left == 1 < all_tokens
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-5 * float(grad.abs().max() + 1))


def test_in_bf16_the_error_is_no_larger_than_with_all_tokens():
    errors = []
    for change in (lambda model: model, compute_all_tokens):
        with torch.autocast("cpu", torch.bfloat16):
            logits, grads, _ = outcome(change(make_model()))
        exact, exact_grads, _ = outcome(compute_all_tokens(make_model()))
        wrong = torch.cat([(grads[name] - grad).flatten() for name, grad in exact_grads.items()])
        errors.append((float((logits - exact).norm()), float(wrong.norm())))
    (logits, grads), (of_all, grads_of_all) = errors
    assert logits < 1.5 * of_all and grads < 1.5 * grads_of_all


@pytest.mark.parametrize("kind", ["average-pool", "class-token-average-pool", "attention-pool"])
def test_the_last_block_computes_all_tokens_if_the_heads_read_them(kind):
    assert outcome(make_model(kind, drop_blocks=()))[2] > 1


def test_a_last_block_with_experts_computes_all_tokens():
    assert outcome(make_model(moe_blocks=(3,)))[2] > 1


def test_forward_hooks_are_called_in_the_last_block():
    model = make_model()
    seen = []
    for layer in (model.vit.blocks[3].attn, model.vit.blocks[3].attn.qkv, model.vit.blocks[3].mlp):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(type(layer).__name__))
    changed = model(IMAGES, "two").logits
    assert seen == ["Linear", "Attention", "Mlp"]
    torch.testing.assert_close(changed, make_model()(IMAGES, "two").logits, rtol=1e-5, atol=1e-5)
