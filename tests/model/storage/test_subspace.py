"""Subspace storage against singular values, against exact gradients, and in all kinds of blocks."""

import pytest
import torch
from tiny_models import gradients, make_model, normal
from tiny_storages import MODELS, forward, kept_by, kept_by_block, predicted_and_step
from torch.nn import functional as F

from moe_bsr.config import ConfigError, TokensConfig
from moe_bsr.model.storage.subspace import InSubspace


def spectrum(*shape: int, decay: float = 0.5) -> torch.Tensor:
    """Return activations with singular values that fall by `decay` each, in directions unrelated to the channels."""
    u, _, v = torch.linalg.svd(normal(torch.Size(shape[:-1]).numel(), shape[-1]), full_matrices=False)
    return (u * (10 * decay ** torch.arange(shape[-1]))) @ v


def test_a_matrix_of_the_kept_rank_is_restored():
    x = (normal(60, 8) @ normal(8, 32, seed=1)).view(3, 20, 32)
    packed = InSubspace(x, 0.25)
    assert packed.coefficients.shape == (60, 8) and packed.basis.shape == (32, 8)
    torch.testing.assert_close(packed.restore(), x, rtol=0, atol=1e-5 * float(x.abs().max()))


def test_the_error_is_close_to_that_of_the_best_subspace():
    x = spectrum(4 * 30, 32, decay=0.8).view(4, 30, 32)
    values = torch.linalg.svdvals(x.view(-1, 32))
    lost = (InSubspace(x, 0.25).restore() - x)[:, 1:].norm()
    assert 0.9 * values[8:].norm() < lost < 1.05 * values[8:].norm()


def test_first_tokens_are_exact_and_the_memory_of_the_others_is_freed():
    x = normal(4, 50, 32)
    packed = InSubspace(x, 0.25)
    assert torch.equal(packed.restore()[:, 0], x[:, 0]) and not torch.equal(packed.restore()[:, 1], x[:, 1])
    kept = [packed.coefficients, packed.basis, packed.first]
    assert sum(t.untyped_storage().nbytes() for t in kept) == 4 * (200 * 8 + 32 * 8 + 4 * 32)


@pytest.mark.parametrize("x", [normal(6, 1, 16), normal(10, 16), normal(2, 50, 16)], ids=["first", "few", "full"])
def test_tensors_that_would_not_shrink_are_kept_unchanged(x):
    assert InSubspace(x, 1.0 if len(x) == 2 else 0.75).restore() is x


def step(storage, bf16: bool = False, **plan):
    model = make_model(storage=storage, **plan).train()
    loss, logits = forward(model, 12, bf16)
    loss.backward()
    return torch.cat([g.flatten() for g in gradients(model).values()]), logits


PLANS = MODELS | {
    "grouped": {"moe_blocks": (1, 3), "init_noise": 0.1, "backend": "grouped"},
    "low-rank experts": {"moe_blocks": (1, 3), "experts": "low_rank", "rank": 4},
    "merging": {"tokens": TokensConfig(reduce="merge")},
}


@pytest.mark.parametrize("name", PLANS)
def test_the_forward_pass_is_exact_and_gradients_improve_with_the_rank(name):
    exact, logits = step("exact", **PLANS[name])
    errors = []
    for rank in (0.25, 0.6, 1.0):
        found, same = step({"kind": "subspace", "rank": rank}, **PLANS[name])
        assert torch.equal(same, logits)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert 1e-4 < errors[1] < errors[0] < 1 and errors[2] < 1e-5


def test_bf16_is_kept_in_bf16():
    exact, logits = step("exact", bf16=True)
    found, same = step({"kind": "subspace", "rank": 0.6}, bf16=True)
    assert torch.equal(same, logits) and F.cosine_similarity(found, exact, dim=0) > 0.9
    packed = InSubspace(normal(4, 50, 32).bfloat16(), 0.25)
    assert packed.coefficients.dtype == packed.basis.dtype == packed.restore().dtype == torch.bfloat16


def test_a_basis_depends_only_on_its_micro_batch():
    """Earlier draws of random numbers have no effect: the same images give bitwise equal gradients."""
    first, _ = step({"kind": "subspace", "rank": 0.5})
    torch.rand(3)
    again, _ = step({"kind": "subspace", "rank": 0.5})
    assert torch.equal(first, again)


IMAGES, TOKENS, WIDTH, HEADS, RANK = 5, 17, 16, 2, 4


def test_bytes_kept_by_a_trained_block_match_the_formula():
    """Three matrices of coefficients, bases and first tokens, and the two norms' statistics."""
    cost, step = predicted_and_step({"kind": "subspace", "rank": RANK / WIDTH}, IMAGES)
    rows = IMAGES * TOKENS
    formula = 3 * 4 * (rows * RANK + WIDTH * RANK + IMAGES * WIDTH) + 4 * 4 * rows
    by_block = kept_by_block(cost)
    assert by_block["block 1"] == by_block["block 2"] == formula
    assert cost.kept == pytest.approx(kept_by(step), abs=64)


@pytest.mark.parametrize("rank", [0, 1.5, -1.0])
def test_a_rank_outside_its_range_is_refused(rank):
    with pytest.raises(ConfigError, match="storage.rank = .*: a share of the width, above 0 and at most 1"):
        make_model(storage={"kind": "subspace", "rank": rank})
