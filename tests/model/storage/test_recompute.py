"""Storage that recomputes blocks: bitwise equal gradients, and every decision made only once."""

import pytest
import torch
from tiny_models import gradients, make_model, make_vit, normal, plain_autograd, saved_for_backward, scale_routers
from torch.nn import functional as F

from moe_bsr.config import TokensConfig
from moe_bsr.model import block, replay
from moe_bsr.model.replay import Replay
from moe_bsr.model.tokens import FUSED, Tokens
from moe_bsr.ops import experts as experts_module
from moe_bsr.ops import linear as linear_module


@pytest.fixture
def decided(monkeypatch) -> list[str]:
    """Names of the decisions made during the test, in order."""
    made = []

    class Counting(Replay):
        def record(self, name, decide):
            return super().record(name, lambda: made.append(name) or decide())

    monkeypatch.setattr(replay, "Replay", Counting)
    return made


def train_step(storage: str, images: torch.Tensor, noise: float, router: str, tokens: TokensConfig):
    vit = make_vit()
    if images.std() == 0:
        vit.pos_embed.data[:, 1:] = 0.0  # with a constant image all patches tie
    model = make_model(
        vit=vit,
        storage=storage,
        train_blocks=(0, 2, 3),
        drop_blocks=(0, 1, 2),
        keep_rate=0.6,
        moe_blocks=(0, 2, 3),
        router=router,
        gate_noise=noise,
        init_noise=0.1,
        balance_loss="across_tasks",
        balance_loss_weight=1.0,
        tokens=tokens,
    ).train()
    scale_routers(model, 20.0)
    for task in ("one", "two"):
        model.zero_grad()
        output = model(images, task, noise_key=(0, 7, 0))
        (F.cross_entropy(output.logits, torch.tensor([0, 1, 2])) + output.auxiliary_loss).backward()
        model.commit(output, task)
    return model, output


PROTECTED = TokensConfig(protect_fused=True, rank_by="logits")


@pytest.mark.parametrize(
    ("router", "noise", "ties", "tokens"),
    [
        ("per_task", 0.0, False, TokensConfig()),
        ("per_task", 4.0, True, PROTECTED),
        ("task_conditioned", 0.0, True, PROTECTED),
        ("task_conditioned", 4.0, False, PROTECTED),
        ("task_conditioned", 4.0, True, TokensConfig()),
    ],
)  # covers each pair of values
def test_recomputation_is_exact_and_repeats_no_decision(decided, router, noise, ties, tokens):
    images = torch.ones(3, 3, 16, 16) if ties else normal(3, 3, 16, 16)
    runs, counts = [], []
    for storage in ("exact", "recompute"):
        decided.clear()
        runs.append(train_step(storage, images, noise, router, tokens))
        counts.append({name: decided.count(name) for name in set(decided)})
    assert counts[0] == counts[1] == {"kept tokens": 6, "experts": 6} | ({"gate noise": 6} if noise else {})

    (exact, output), (again, replayed) = runs
    assert torch.equal(output.logits, replayed.logits)
    assert torch.equal(output.auxiliary_loss, replayed.auxiliary_loss)
    left, right = gradients(exact), gradients(again)
    assert left.keys() == right.keys() and any(".router." in name for name in left)
    for name, gradient in left.items():
        assert torch.equal(gradient, right[name]), name
    again_state = again.state_dict()
    for name, value in exact.state_dict().items():
        assert torch.equal(value, again_state[name]), f"{name}: statistics are folded in once"
    for index, record in output.records.items():
        other = replayed.records[index]
        if record.dropped is not None:
            assert torch.equal(record.dropped.origin, other.dropped.origin)
        if record.routing is not None:
            assert torch.equal(record.routing.experts, other.routing.experts)
            assert torch.equal(record.routing.load, other.routing.load)
    if ties:
        assert output.records[0].dropped.origin[0].tolist() == [*range(10), FUSED]


def test_recomputation_keeps_less():
    sizes = []
    for storage in ("exact", "recompute"):
        model = make_model(storage=storage, train_blocks=(1, 3), moe_blocks=(1, 3))
        with plain_autograd():
            saved = saved_for_backward(lambda model=model: model(normal(3, 3, 16, 16), "one"))
        sizes.append(sum(t.numel() for t in saved if not isinstance(t, torch.nn.Parameter)))
    assert sizes[1] < 0.1 * sizes[0]


def test_without_gradients_nothing_is_recomputed_and_the_result_is_the_same():
    images = normal(3, 3, 16, 16)
    exact, again = (make_model(storage=s, moe_blocks=(1, 3)).eval() for s in ("exact", "recompute"))
    with torch.no_grad():
        assert torch.equal(exact(images, "one").logits, again(images, "one").logits)


@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_a_block_recomputed_from_a_rounded_input_keeps_its_decisions(noise):
    """Imitate an int8 copy of the block input: values close to the first run, the same discrete choices."""
    model = make_model(moe_blocks=(1, 3), gate_noise=noise).train()
    scale_routers(model, 20.0)
    x = normal(8, 17, 16)
    step = x.abs().max() / 31
    rounded = (x / step).round() * step
    origin = torch.arange(16).expand(8, -1)

    def run(x, replay):
        tokens, record = block.forward(
            model.vit.blocks[1],
            Tokens(x, origin),
            model.contexts[1],
            "one",
            replay,
            noise_key=(1, 2),
        )
        return tokens.origin, record.routing.experts

    replay = Replay()
    first, replayed, fresh = run(x, replay), run(rounded, replay), run(rounded, Replay())
    assert all(torch.equal(a, b) for a, b in zip(first, replayed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, fresh, strict=True))


@pytest.mark.parametrize("experts", [(), (1, 3)], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", ["class-token", "layer-scale"])
def test_the_last_product_is_recomputed_only_where_its_values_are_kept(kind, experts, monkeypatch):
    """A trained LayerScale keeps these values for its own gradient."""
    found, needs_output = [], []
    for storage in ("exact", "recompute"):
        model = make_model(kind, storage=storage, train_blocks=(1, 3), moe_blocks=experts).train()
        output = model(normal(3, 3, 16, 16), "one", noise_key=(0, 0, 0))
        with monkeypatch.context() as patch:
            for module in (linear_module, experts_module):
                original = module.empty_output

                def counted(*arguments, original=original, storage=storage):
                    needs_output.append(storage)
                    return original(*arguments)

                patch.setattr(module, "empty_output", counted)
            output.logits.square().sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    again = 3 if kind == "class-token" else 1  # blocks 1, 2, 3; LayerScale of the frozen block is a constant
    assert needs_output == ["recompute"] * again
