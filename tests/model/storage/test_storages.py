"""All storages: rounded activations give close gradients, and each block can have its own storage."""

from functools import cache

import pytest
import torch
from tiny_models import gradients, make_model, normal, saved_for_backward, scale_routers
from torch.nn import functional as F

from moe_bsr.config import ConfigError
from moe_bsr.model.plan import choices_of_blocks
from moe_bsr.model.routers import ROUTERS
from moe_bsr.model.storage import STORAGES
from moe_bsr.model.storage.by_kind import Table, packable, run_by_kind
from moe_bsr.model.storage.codecs import BFloat16Packed, Int4Packed, Int8Packed


def step(storage, experts=(1, 3)):
    """Return the gradients and the output of one training step of a small model."""
    model = make_model(
        storage=storage, train_blocks=(1, 3), drop_blocks=(1, 2), moe_blocks=experts, init_noise=0.1
    ).train()
    scale_routers(model, 5.0)
    output = model(normal(6, 3, 16, 16), "one")
    (F.cross_entropy(output.logits, torch.arange(6) % 3) + output.auxiliary_loss).backward()
    return gradients(model), output


@cache
def exact_step(experts):
    return step("exact", experts)


@pytest.mark.parametrize("experts", [(), (1, 3)], ids=["dense", "experts"])
@pytest.mark.parametrize("storage", sorted(STORAGES))
def test_the_forward_pass_is_exact_and_gradients_are_close(storage, experts):
    expected, exact = exact_step(experts)
    got, output = step(storage, experts)
    assert torch.equal(output.logits, exact.logits)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        if storage in ("exact", "recompute", "segments"):
            assert torch.equal(gradient, expected[name]), name
        elif not STORAGES[storage].coarse:
            cosine = F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
            assert cosine > 0.99, (name, cosine)


@pytest.mark.parametrize("storage", sorted(STORAGES))
def test_a_second_backward_pass_gives_the_same_gradients_or_a_clear_error(storage):
    model = make_model(storage=storage, train_blocks=(1, 3), drop_blocks=(1, 2), moe_blocks=(1,)).train()
    loss = F.cross_entropy(model(normal(6, 3, 16, 16), "one").logits, torch.arange(6) % 3)
    loss.backward(retain_graph=True)
    first = gradients(model)
    model.zero_grad()
    if storage in ("recompute_int8", "recompute_int4"):
        with pytest.raises(RuntimeError, match=f"second backward pass.*{storage}"):
            loss.backward()
        return
    loss.backward()
    assert {n: g.tolist() for n, g in gradients(model).items()} == {n: g.tolist() for n, g in first.items()}


@pytest.mark.parametrize("storage", sorted(STORAGES))
def test_weights_changed_between_forward_and_backward_pass_are_an_error(storage):
    model = make_model(storage=storage, adapter="lora", train_blocks=(), drop_blocks=())
    loss = model(normal(2, 3, 16, 16), "one").logits.square().sum()
    with torch.no_grad():
        for parameter in model.adapter_parameters[3]:
            parameter.add_(1.0)
    with pytest.raises(RuntimeError, match="in.?place"):
        loss.backward()


@pytest.mark.parametrize("storage", sorted(STORAGES))
def test_gradients_of_gradients_are_an_error(storage):
    model = make_model(storage=storage)
    loss = model(normal(2, 3, 16, 16), "one").logits.square().sum()
    trained = [p for p in model.vit.blocks[1].parameters() if p.requires_grad]
    penalty = sum(g.square().sum() for g in torch.autograd.grad(loss, trained, create_graph=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (loss + penalty).backward()


@pytest.mark.parametrize("kind", [BFloat16Packed, Int8Packed])
def test_statistics_and_weights_of_tokens_are_not_rounded(kind, monkeypatch):
    """Also with many tokens and images. In float32, attention keeps one log-sum-exp per row as well."""
    rounded = []
    monkeypatch.setattr(
        kind, "__init__", (lambda make: lambda self, x: rounded.append(x.shape) or make(self, x))(kind.__init__)
    )
    model = make_model(
        storage=kind is BFloat16Packed and "bf16" or "int8", train_blocks=(1, 3), drop_blocks=(1, 2)
    ).train()
    model(normal(20, 3, 32, 32) if model.vit.patch_embed.img_size[0] == 32 else normal(20, 3, 16, 16), "one")
    widths = {model.vit.embed_dim * factor for factor in (1, 2, 3, 4)}
    assert rounded and {shape[-1] for shape in rounded} <= widths


def test_a_mixture_gives_each_block_its_own_storage():
    exact, int8, again = (STORAGES.choose(kind) for kind in ("exact", "int8", "recompute"))
    mixture = [{"kind": "recompute", "blocks": [1]}, {"kind": "int8", "blocks": [0, 2]}]
    assert choices_of_blocks(STORAGES, "int8", 3, exact) == [int8] * 3
    assert choices_of_blocks(STORAGES, mixture, 4, exact) == [int8, again, int8, exact]
    expected, _ = step("exact")
    mixed, _ = step([{"kind": "recompute", "blocks": [1, 2]}, {"kind": "int8", "blocks": [3]}])
    for name, gradient in mixed.items():
        assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.99, name
    assert any(not torch.equal(mixed[n], expected[n]) for n in mixed if "blocks.3" in n)


@pytest.mark.parametrize(
    "storage, message",
    [
        ([{"kind": "recompute", "blocks": [9]}], "[9] outside the backbone's blocks 0 to 3"),
        ([{"kind": "recompute", "blocks": [1]}, {"kind": "int8", "blocks": [1]}], "each block once"),
        ([{"kind": "recompute"}], "each entry is a mapping with kind and blocks"),
        ({"kind": "int8", "bits": 4}, "unknown key storage.bits"),
    ],
)
def test_impossible_mixtures_are_refused(storage, message):
    with pytest.raises(ConfigError) as error:
        make_model(storage=storage)
    assert message in str(error.value)


def test_an_unknown_storage_is_refused_with_the_closest_name():
    with pytest.raises(ConfigError, match="storage = 'recomptue'.*did you mean 'recompute'"):
        make_model(storage="recomptue")


def test_int8_keeps_a_quarter_of_float32():
    x = normal(4, 50, 16).requires_grad_()
    made = []

    class Counting(Int8Packed):
        def __init__(self, x):
            super().__init__(x)
            made.append((x.nbytes, self.kept.nbytes + self.scale.nbytes))

    run_by_kind(Table(other=Counting), lambda x: (x @ x.transpose(1, 2)).sum() + x.exp().sum(), x, []).backward()
    before, after = (sum(sizes) for sizes in zip(*made, strict=True))
    assert 0 < after < 0.27 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantization_is_within_half_a_step_of_each_channel(dtype):
    x = (normal(3, 40, 16) * torch.logspace(-3, 3, 16)).to(dtype)
    packed = Int8Packed(x)
    back = packed.restore()
    assert packed.kept.itemsize == 1 and packed.kept.shape == (3, 40, 16)
    assert back.shape == x.shape and back.dtype == dtype
    step = x.float().abs().amax(1, keepdim=True) / 126
    bound = 0.5 * step + 2**-7 * x.float().abs()  # half a step, and the rounding of the scale
    assert ((back.float() - x.float()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_spans_the_range_of_each_channel_without_the_first_token(dtype):
    """For any offset of the channel and any size of the first token, which is kept in bfloat16."""
    x = normal(3, 40, 17) * torch.logspace(-3, 3, 17) + 100 * normal(17, seed=1)
    x[:, 0] *= 1000
    x = x.to(dtype)
    packed = Int4Packed(x)
    back, others = packed.restore(), x[:, 1:].float()
    assert packed.kept.itemsize == 1 and packed.kept.shape == (3, 40, 9)
    assert back.shape == x.shape and back.dtype == dtype and torch.equal(back[:, 0], x[:, 0].bfloat16().to(dtype))
    span = others.amax(1, keepdim=True) - others.amin(1, keepdim=True)
    largest = span + others.abs().amax(1, keepdim=True)
    rounding = (2**-8 + torch.finfo(dtype).eps) * largest + 2**-8 * span  # of the lowest value, the sum, the scale
    assert ((back[:, 1:].float() - others).abs() <= span / 30 + rounding).all()
    for alone in (normal(2, 1, 16), torch.full((2, 5, 16), 0.3)):
        assert torch.equal(Int4Packed(alone).restore(), alone.bfloat16().float())


@cache
def router_gradient(storage: str, renormalize: bool, **moe) -> torch.Tensor:
    """Return all router gradients as one vector, for experts that are equal copies, as at the start of training."""
    model = make_model(
        storage=storage, moe_blocks=(1, 3), init_noise=0.0, renormalize_gates=renormalize, balance_loss="none", **moe
    ).train()
    F.cross_entropy(model(normal(12, 3, 16, 16), "one").logits, torch.arange(12) % 3).backward()
    return torch.cat([g.flatten() for name, g in gradients(model).items() if ".router." in name])


@pytest.mark.parametrize(("router", "backend"), list(zip(sorted(ROUTERS), ["loop", "grouped"], strict=True)))
@pytest.mark.parametrize("storage", sorted(STORAGES))
def test_routers_of_equal_experts_get_no_spurious_gradient_from_any_storage(storage, router, backend):
    """Copies of one FFN differ only by rounding. `size` is the norm of the gradient of a router that does learn."""
    size = router_gradient("exact", False, router=router).norm()
    options = {"renormalize": True, "router": router, "backend": backend}
    assert (router_gradient(storage, **options) - router_gradient("exact", **options)).norm() < 1e-5 * size


def test_zeros_stay_zeros():
    for codec in (Int8Packed, Int4Packed):
        assert torch.equal(codec(torch.zeros(2, 64)).restore(), torch.zeros(2, 64))


def test_a_tensor_saved_twice_is_packed_once_and_parameters_never():
    x = normal(4, 8, 16).requires_grad_()
    weight = torch.nn.Parameter(normal(16, 16))
    kept = []

    class Counting(BFloat16Packed):
        def __init__(self, x):
            super().__init__(x)
            kept.append(x)  # keep it alive, so that no address is reused

    def forward(tokens):
        inner = (2 * tokens).sigmoid()
        return (inner @ weight).sum() + (inner @ weight.t()).sum() + inner.square().sum()

    run_by_kind(Table(other=Counting), forward, x, []).backward()
    addresses = [x.data_ptr() for x in kept]
    assert len(addresses) == len(set(addresses)) and weight.data_ptr() not in addresses
    assert not packable(weight) and not packable(torch.zeros(3, dtype=torch.int64))


def test_copies_of_weights_are_not_packed():
    """Autocast makes such copies in code that is not ours. The stacks of experts come transposed."""
    x, one, stack = normal(4, 8, 16).requires_grad_(), normal(24, 16), normal(3, 20, 16)

    def forward(tokens):
        y = tokens @ one.bfloat16().float().t()
        return y.sum() + (tokens[:3] @ stack.bfloat16().float().transpose(1, 2)).sum()

    (expected,) = torch.autograd.grad(forward(x), x)
    (found,) = torch.autograd.grad(run_by_kind(Table(other=Int8Packed), forward, x, [one, stack]), x)
    assert torch.equal(found, expected)


def test_recomputation_saves_only_the_block_input():
    model = make_model(storage="recompute", train_blocks=(1, 3), drop_blocks=(1,), moe_blocks=())
    saved = [
        t
        for t in saved_for_backward(lambda: model(normal(6, 3, 16, 16), "one"))
        if not isinstance(t, torch.nn.Parameter) and t.ndim == 3 and t.shape[-1] >= 16
    ]
    inputs = [t for t in saved if t.shape[-1] == 16]
    assert len(saved) == len(inputs) <= 3 + 1  # blocks 1 to 3 and the final norm
