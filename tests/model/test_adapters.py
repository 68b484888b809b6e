"""Adapters: nothing changes at the start, they alone train where the block is frozen, and they merge."""

import pytest
import torch
from tiny_models import gradients, make_model, make_vit, normal
from torch import nn

from moe_bsr.config import ConfigError
from moe_bsr.model.adapters.lora import LoRALinear

EVERYWHERE = {"kind": "lora", "rank": 2, "layers": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]}


def loras(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


@pytest.mark.parametrize(
    "adapter, layers",
    [("lora", 4), (EVERYWHERE, 16), ([{"kind": "lora", "blocks": [0, 2]}], 2)],
    ids=["all", "deep", "two"],
)
def test_at_the_start_the_network_is_the_pretrained_one(adapter, layers):
    images = normal(2, 3, 16, 16)
    plain, adapted = make_model(), make_model(adapter=adapter)
    assert torch.equal(adapted(images, "one").logits, plain(images, "one").logits)
    assert len(loras(adapted)) == layers


def test_in_a_frozen_block_the_adapter_alone_trains():
    model = make_model(train_blocks=(), drop_blocks=(1,), adapter=[{**EVERYWHERE, "blocks": [1]}])
    assert model.path_start == 1
    for layer in loras(model).values():
        layer.lora_b.data.copy_(normal(*layer.lora_b.shape))
    model(normal(2, 3, 16, 16), "one").logits.square().sum().backward()
    trained = {name for name in gradients(model) if name.startswith("vit.")}
    expected = {f"{name}.{part}" for name in loras(model) for part in ("lora_a", "lora_b")}
    assert trained == expected and len(expected) == 8


def test_gradients_are_those_of_the_sum_written_out():
    layer = make_model(adapter=[{"kind": "lora", "rank": 3, "blocks": [1]}]).vit.blocks[1].attn.qkv
    layer.lora_b.data.copy_(normal(*layer.lora_b.shape))
    x = normal(2, 5, 16)
    found = torch.autograd.grad(layer(x).square().sum(), [layer.lora_a, layer.lora_b])
    weight = layer.base.weight + layer.scale * layer.lora_b @ layer.lora_a
    y = x @ weight.t() + layer.base.bias
    expected = torch.autograd.grad(y.square().sum(), [layer.lora_a, layer.lora_b])
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_merged_it_is_one_layer_with_the_same_output():
    layer = make_model(adapter="lora").vit.blocks[0].attn.qkv
    layer.lora_b.data.copy_(normal(*layer.lora_b.shape))
    x = normal(2, 5, 16)
    before = layer(x)
    torch.testing.assert_close(layer.merged()(x), before)


@pytest.mark.parametrize(
    "adapter, message",
    [
        ("lorra", "adapter = 'lorra': one of lora; did you mean 'lora'?"),
        ({"kind": "lora", "rank": 0}, "adapter.rank = 0: at least 1"),
        ({"kind": "lora", "layers": ["attn.q"]}, "adapter.layers = ['attn.q']: some of attn.qkv"),
        ([{"kind": "lora", "layers": ["mlp.fc1"], "blocks": [3]}], "this block has no such linear layer"),
    ],
)
def test_what_cannot_be_is_refused(adapter, message):
    with pytest.raises(ConfigError) as error:
        make_model(adapter=adapter, moe_blocks=(3,))
    assert message in str(error.value)


class Doubled(nn.Module):
    """A layer of a kind that the model does not know, as an adapter library would put in place."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.weight = base.weight  # what a model that takes weights out of layers would use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.base_layer(x)


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("grad", [False, True])
def test_an_unknown_layer_is_called_and_never_opened(path, grad):
    images = normal(2, 3, 16, 16)
    wrapped, doubled = make_model(drop_blocks=()), make_model(vit=make_vit(), drop_blocks=())
    owner, _, name = path.rpartition(".")
    for model, twice in ((wrapped, False), (doubled, True)):
        block = model.vit.blocks[1]
        layer = block.get_submodule(path)
        if twice:
            for parameter in layer.parameters():
                parameter.data.mul_(2)
        else:
            setattr(block.get_submodule(owner), name, Doubled(layer))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(wrapped(images, "one").logits, doubled(images, "one").logits)


def test_a_hook_on_a_layer_is_called():
    model, seen = make_model(drop_blocks=()), []
    for path in ("attn.qkv", "mlp", "mlp.fc2"):
        model.vit.blocks[1].get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    model(normal(2, 3, 16, 16), "one")
    assert seen == ["attn.qkv", "mlp.fc2", "mlp"]
