"""The kernels on a CUDA device against their references, and a whole step against the same step on the CPU."""

import copy

import pytest
import torch
from tiny_models import gradients, make_model, normal, scale_routers
from torch.nn import functional as F

from moe_bsr import ops
from moe_bsr.config import TokensConfig
from moe_bsr.model.storage import STORAGES
from moe_bsr.ops.attention import attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # bounds on the relative error in the L2 norm


def relative_error(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(autouse=True)
def full_precision():
    """Compute convolutions in float32, for which cuDNN would otherwise use TF32."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("tokens", [28, 197])
def test_attention_equals_its_reference(dtype, tokens):
    results = []
    for reference in (False, True):
        qkv = normal(4, tokens, 3 * 3 * 16).cuda().to(dtype).requires_grad_()
        with ops.reference() if reference else torch.enable_grad():
            y, row, logits = attention(qkv, 3, 0.25, scores=True)
            (y.float().square().sum() + (row * torch.linspace(0, 1, tokens, device="cuda")).sum()).backward()
        results.append([y, row, logits, qkv.grad])
    for have, want in zip(*results, strict=True):
        assert relative_error(have, want) < BOUNDS[dtype]


def step(model, device: str, dtype: torch.dtype = torch.float32):
    model, images = model.to(device).train(), normal(6, 3, 16, 16).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model(images, "one")
    (F.cross_entropy(output.logits, torch.arange(6, device=device) % 3) + output.auxiliary_loss).backward()
    return output.logits.detach().cpu(), {name: grad.cpu() for name, grad in gradients(model).items()}


@pytest.mark.parametrize("kind", ["class-token", "registers", "average-pool", "layer-scale"])
@pytest.mark.parametrize("moe_blocks", [(), (1, 3)], ids=["dense", "experts"])
@pytest.mark.parametrize("reduce", ["drop", "merge"])
def test_a_float32_step_equals_the_step_on_the_cpu(kind, moe_blocks, reduce):
    model = make_model(kind, moe_blocks=moe_blocks, init_noise=0.1, tokens=TokensConfig(reduce=reduce))
    scale_routers(model, 5.0)
    want_logits, want = step(copy.deepcopy(model), "cpu")
    logits, found = step(model, "cuda")
    torch.testing.assert_close(logits, want_logits, rtol=1e-4, atol=1e-4)
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("storage", sorted(STORAGES))
def test_storages_give_finite_gradients_that_point_the_same_way(storage, dtype):
    model = make_model(train_blocks=(1, 3), moe_blocks=(1,), init_noise=0.1)
    scale_routers(model, 5.0)
    _, want = step(copy.deepcopy(model), "cuda", dtype)
    stored = make_model(train_blocks=(1, 3), moe_blocks=(1,), init_noise=0.1, storage=storage)
    stored.load_state_dict(model.state_dict())
    _, found = step(stored, "cuda", dtype)
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        if want[name].norm() > 1e-6:
            assert F.cosine_similarity(gradient.flatten(), want[name].flatten(), dim=0) > 0.98, name


def test_grouped_experts_match_the_loop_and_are_deterministic():
    results = {}
    for backend in ("loop", "grouped", "grouped"):
        model = make_model(moe_blocks=(1, 3), init_noise=0.1, backend=backend)
        scale_routers(model, 5.0)
        results.setdefault(backend, []).append(step(model, "cuda", torch.bfloat16))
    (first_logits, first), (again_logits, again) = results["grouped"]
    assert torch.equal(first_logits, again_logits)
    assert all(torch.equal(first[name], again[name]) for name in first)
    loop_logits, loop = results["loop"][0]
    assert relative_error(first_logits, loop_logits) < 5e-2
    for name in (n for n in loop if "experts" in n):
        assert F.cosine_similarity(first[name].flatten(), loop[name].flatten(), dim=0) > 0.98, name
