"""Adapters: no change at the start, the only trained weights of a frozen block, and merging into the layer."""

import pytest
import torch
from tiny_models import gradients, make_model, make_vit, normal
from torch import nn

from moe_bsr.config import ConfigError
from moe_bsr.model.adapters.adaptformer import AdaptFormer
from moe_bsr.model.adapters.factored import FactoredLinear
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


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"moe_blocks": (1, 3)}, {"storage": "recompute"}], ids=["dense", "moe", "again"]
)
def test_adaptformer_changes_nothing_at_the_start(changes, grad):
    images = normal(2, 3, 16, 16)
    plain, adapted = make_model(**changes), make_model(adapter={"kind": "adaptformer", "width": 3}, **changes)
    with torch.set_grad_enabled(grad):
        assert torch.equal(adapted(images, "one").logits, plain(images, "one").logits)
    assert sum(isinstance(layer, AdaptFormer) for layer in adapted.modules()) == 4


@pytest.mark.parametrize("storage", ["exact", "recompute"])
def test_adaptformer_equals_its_formula(storage):
    """The adapter reads the tokens that remain after the drop, before the norm."""
    options = {"kind": "adaptformer", "width": 5, "scale": 0.7, "blocks": [1]}
    model = make_model(train_blocks=(), drop_blocks=(1,), adapter=[options], storage=storage)
    block = model.vit.blocks[1]
    parameters = dict(block.beside_ffn.named_parameters())
    assert {name for name, p in model.vit.named_parameters() if p.requires_grad} == {
        f"blocks.1.beside_ffn.{name}" for name in parameters
    }
    for parameter in parameters.values():
        parameter.data.copy_(normal(*parameter.shape))
    recorded = {}
    block.norm2.register_forward_hook(lambda _, inputs, __: recorded.setdefault("x", inputs[0].detach()))
    block.mlp.register_forward_hook(lambda _, __, y: recorded.setdefault("ffn", y.detach()))
    tokens, _ = model.forward_features(normal(2, 3, 16, 16))
    found = model.run_block(1, tokens, "one").x
    down, up = (p.detach().requires_grad_() for p in (parameters["down.weight"], parameters["up.weight"]))
    middle = torch.relu(recorded["x"] @ down.t() + parameters["down.bias"].detach())
    added = 0.7 * (middle @ up.t() + parameters["up.bias"].detach())
    torch.testing.assert_close(found, recorded["x"] + recorded["ffn"] + added)
    weights = normal(*found.shape, seed=1)
    (found * weights).sum().backward()
    for name, expected in zip(("down", "up"), torch.autograd.grad((added * weights).sum(), [down, up]), strict=True):
        torch.testing.assert_close(parameters[f"{name}.weight"].grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("freeze_a", [False, True])
def test_lora_on_fc2_gives_the_same_from_the_activation_input_as_from_its_output(freeze_a):
    """`mlp.fc2` gets the input of the activation, so the activation's output need not be kept."""
    options = {**EVERYWHERE, "blocks": [1], "layers": ["mlp.fc2"], "freeze_a": freeze_a}
    mlp = make_model(train_blocks=(), adapter=[options]).vit.blocks[1].mlp
    mlp.fc2.lora_b.data.copy_(normal(*mlp.fc2.lora_b.shape))
    x = normal(2, 5, 16).requires_grad_()
    wanted = [x, *(p for p in mlp.fc2.parameters() if p.requires_grad)]
    assert len(wanted) == 3 - freeze_a
    behind = mlp.fc2(mlp.act(mlp.fc1(x)))
    torch.testing.assert_close(mlp(x), behind)
    found, expected = (torch.autograd.grad(y.square().sum(), wanted) for y in (mlp(x), behind))
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_a_frozen_random_factor_is_saved_with_the_run():
    model = make_model(adapter={**EVERYWHERE, "freeze_a": True})
    assert not any(layer.lora_a.requires_grad for layer in loras(model).values())
    assert not any("lora" in name for name in model.unchanged_backbone_names())


def test_lora_of_another_library_trains_on_our_layers():
    """Wrapping our layers with peft gives the same numbers as our own LoRA, and gradients only for its factors."""
    peft = pytest.importorskip("peft")
    options = {"kind": "lora", "rank": 2, "alpha": 4.0, "layers": ["attn.qkv", "mlp.fc1", "mlp.fc2"], "blocks": [1]}
    ours, theirs = make_model(adapter=[options]), make_model()
    names = [f"vit.blocks.1.{layer}" for layer in options["layers"]]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=4, target_modules=names), theirs)
    layers = {name: (ours.get_submodule(name), theirs.get_submodule(name)) for name in names}
    for own, other in layers.values():
        own.lora_b.data.copy_(normal(*own.lora_b.shape))
        other.lora_A["default"].weight.data.copy_(own.lora_a)
        other.lora_B["default"].weight.data.copy_(own.lora_b)
    images = normal(2, 3, 16, 16)
    logits = [model(images, "one").logits for model in (ours, theirs)]
    torch.testing.assert_close(*logits)
    for each in logits:
        each.square().sum().backward()
    for own, other in layers.values():
        torch.testing.assert_close(other.lora_A["default"].weight.grad, own.lora_a.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.lora_B["default"].weight.grad, own.lora_b.grad, rtol=1e-4, atol=1e-4)
    assert {name for name in gradients(theirs) if name.startswith("vit.")} == {
        f"{name}.lora_{part}.default.weight" for name in names for part in "AB"
    }


def test_only_the_adapter_trains_in_a_frozen_block():
    model = make_model(train_blocks=(), drop_blocks=(1,), adapter=[{**EVERYWHERE, "blocks": [1]}])
    assert model.path_start == 1
    for layer in loras(model).values():
        layer.lora_b.data.copy_(normal(*layer.lora_b.shape))
    model(normal(2, 3, 16, 16), "one").logits.square().sum().backward()
    trained = {name for name in gradients(model) if name.startswith("vit.")}
    expected = {f"{name}.{part}" for name in loras(model) for part in ("lora_a", "lora_b")}
    assert trained == expected and len(expected) == 8


def test_lora_gradients_equal_those_of_the_formula():
    layer = make_model(adapter=[{"kind": "lora", "rank": 3, "blocks": [1]}]).vit.blocks[1].attn.qkv
    layer.lora_b.data.copy_(normal(*layer.lora_b.shape))
    x = normal(2, 5, 16)
    found = torch.autograd.grad(layer(x).square().sum(), [layer.lora_a, layer.lora_b])
    weight = layer.base.weight + layer.scale * layer.lora_b @ layer.lora_a
    y = x @ weight.t() + layer.base.bias
    expected = torch.autograd.grad(y.square().sum(), [layer.lora_a, layer.lora_b])
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_a_merged_lora_layer_gives_the_same_output():
    layer = make_model(adapter="lora").vit.blocks[0].attn.qkv
    layer.lora_b.data.copy_(normal(*layer.lora_b.shape))
    x = normal(2, 5, 16)
    before = layer(x)
    torch.testing.assert_close(layer.merged()(x), before)


# --- factored weights ---


def factored(**options) -> dict:
    return {"kind": "factored", "layers": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"], **options}


def test_factors_of_full_rank_compute_the_pretrained_network():
    images = normal(2, 3, 16, 16)
    plain, model = make_model(), make_model(adapter=factored(rank=1.0))
    torch.testing.assert_close(model(images, "one").logits, plain(images, "one").logits, rtol=1e-4, atol=1e-5)
    assert sum(isinstance(layer, FactoredLinear) for layer in model.modules()) == 16


@pytest.mark.parametrize("freeze_right", [False, True])
def test_factored_weights_equal_their_formula(freeze_right):
    plain = make_model(train_blocks=()).vit.blocks[1].mlp
    options = factored(rank=0.3, layers=["mlp.fc1", "mlp.fc2"], freeze_right=freeze_right)
    mlp = make_model(train_blocks=(), adapter=options).vit.blocks[1].mlp
    x = normal(2, 5, 16).requires_grad_()
    factors, expected = {}, x
    for name, activation in (("fc1", torch.nn.functional.gelu), ("fc2", nn.Identity())):
        layer, weight = mlp.get_submodule(name), plain.get_submodule(name).weight.detach()
        u, s, v = torch.linalg.svd(weight.double())
        best = (u[:, :5] * s[:5] @ v[:5]).float()  # rank: 0.3 x 16, rounded up
        torch.testing.assert_close(layer.left @ layer.right, best, rtol=1e-4, atol=1e-5)
        factors[name] = [part.detach().clone().requires_grad_() for part in (layer.left, layer.right)]
        left, right = factors[name]
        expected = activation(expected @ (left @ right).t() + layer.bias)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mlp.fc2(mlp.act(mlp.fc1(x))), expected, rtol=1e-4, atol=1e-5)
    mlp(x).square().sum().backward()
    found = x.grad
    want = torch.autograd.grad(expected.square().sum(), [x, *(p for pair in factors.values() for p in pair)])
    torch.testing.assert_close(found, want[0], rtol=1e-3, atol=1e-4)
    layers = [mlp.get_submodule(name) for name in factors]
    for parameter, expected in zip((p for layer in layers for p in layer.new), want[1:], strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4)
    assert [layer.right.requires_grad for layer in layers] == [not freeze_right] * 2


def test_only_the_factors_train_in_a_frozen_block_and_the_weight_is_gone():
    model = make_model(train_blocks=(), adapter=[factored(rank=0.5, blocks=[1])])
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert {name for name, p in model.vit.named_parameters() if p.requires_grad} == {
        f"blocks.1.{layer}.{part}" for layer in layers for part in ("left", "right")
    }
    assert not any(f"blocks.1.{layer}.weight" in name for layer in layers for name, _ in model.named_parameters())
    assert not any(part in name for part in ("left", "right") for name in model.unchanged_backbone_names())


def test_merged_factors_give_the_same_output():
    layer = make_model(adapter=factored(rank=0.4)).vit.blocks[0].attn.qkv
    x = normal(2, 5, 16)
    torch.testing.assert_close(layer.merged()(x), layer(x), rtol=1e-4, atol=1e-5)


# --- what is refused, and layers of others ---


@pytest.mark.parametrize(
    "adapter, message",
    [
        ({"kind": "factored", "rank": 0.0}, "adapter.rank = 0.0: a share of the smaller side"),
        ({"kind": "factored", "rank": 64}, "adapter.rank = 64"),
        ("lorra", "adapter = 'lorra': one of lora, adaptformer, repnet, ladder, factored; did you mean 'lora'?"),
        ({"kind": "lora", "rank": 0}, "adapter.rank = 0: at least 1"),
        ({"kind": "adaptformer", "width": 0}, "adapter.width = 0: at least 1"),
        ({"kind": "adaptformer", "scale": 0.0}, "adapter.scale = 0.0: above 0"),
        ({"kind": "repnet", "published": "no"}, "adapter.published = 'no'"),
        ({"kind": "lora", "layers": ["attn.q"]}, "adapter.layers = ['attn.q']: some of attn.qkv"),
        ([{"kind": "lora", "layers": ["mlp.fc1"], "blocks": [3]}], "this block has no such linear layer"),
    ],
)
def test_an_invalid_adapter_is_refused(adapter, message):
    with pytest.raises(ConfigError) as error:
        make_model(adapter=adapter, moe_blocks=(3,))
    assert message in str(error.value)


class Doubled(nn.Module):
    """Layer of an unknown type, as an adapter library would insert."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.weight = base.weight  # a model that reads weights directly would use this one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.base_layer(x)


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_of_unknown_type_is_called_as_a_module(path, grad):
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
    model, called = make_model(drop_blocks=()), []
    for path in ("attn.qkv", "mlp", "mlp.fc2"):
        model.vit.blocks[1].get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))
    model(normal(2, 3, 16, 16), "one")
    assert called == ["attn.qkv", "mlp.fc2", "mlp"]
