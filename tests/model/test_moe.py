"""The expert layer (dispatch, combine, upcycling) against dense and explicit references."""

import copy

import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLUPacked
from tiny_models import TASKS, WIDTH, make_mlp, make_moe, normal
from torch import nn
from torch.nn import functional as F

from moe_bsr.config import ConfigError, MoEConfig
from moe_bsr.model.experts import Experts
from moe_bsr.model.moe import MoE, upcycling_error
from moe_bsr.model.replay import Replay
from moe_bsr.ops import experts
from moe_bsr.ops.experts import sort_by_expert

ROUTERS = ["per_task", "task_conditioned"]
ENGINES = ["loop", "grouped"]


def every_expert_on_every_token(moe: MoE, x: torch.Tensor, routing) -> torch.Tensor:
    """Compute the dense reference (B, N, D) -> (B, N, D): a masked sum over the outputs of all experts."""
    experts, count = moe.experts, routing.probabilities.shape[-1]
    outputs = []
    for e in range(count):
        b1, b2 = (None if b is None else b[e] for b in (experts.fc1_bias, experts.fc2_bias))
        hidden = F.gelu(F.linear(x, experts.fc1_weight[e], b1))
        gate = (routing.gates * (routing.experts == e)).sum(-1, keepdim=True)
        outputs.append(gate * F.linear(hidden, experts.fc2_weight[e], b2))
    return torch.stack(outputs).sum(0)


def gates_of(moe: MoE) -> list[torch.Tensor]:
    """Return a list that collects the gates of every later routing and retains their gradients."""
    gates, route = [], type(moe).route

    def routed(*arguments):
        routing = route(moe, *arguments)
        routing.gates.retain_grad()
        gates.append(routing.gates)
        return routing

    moe.route = routed
    return gates


class Fixed(Replay):
    """Replay that already holds the experts of every token."""

    def __init__(self, experts: torch.Tensor) -> None:
        super().__init__()
        self.record("experts", lambda: experts)


# --- dispatch, experts, combine ---


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "shape, options",
    [
        ((3, 7), {}),
        ((3, 7), {"renormalize_gates": False}),
        ((3, 7), {"num_experts": 6, "top_k": 6}),
        ((1, 1), {"num_experts": 6, "top_k": 3}),
        ((2, 5), {"num_experts": 1, "top_k": 1}),
        ((1, 3), {"num_experts": 16, "top_k": 4}),
        ((2, 5), {"mlp_ratio": 1, "num_experts": 8, "top_k": 4}),
        ((3, 7), {"router": "task_conditioned"}),
    ],
    ids=["plain", "raw-gates", "all-experts", "one-token", "one-expert", "mostly-empty", "ratio-1", "conditioned"],
)
def test_backends_equal_the_dense_reference(kernels, engine, bias, shape, options):
    moe = make_moe(bias=bias, backend=engine, **options)
    x, weight = normal(*shape, WIDTH, seed=5), normal(*shape, WIDTH, seed=6)
    results = []
    for dense in (False, True):
        leaf = x.clone().requires_grad_()
        gates = gates_of(moe)
        y, routing = moe(leaf, "two", Replay())
        if dense:
            y = every_expert_on_every_token(moe, leaf, routing)
        moe.zero_grad()
        (y * weight).sum().backward()
        gradients = {n: p.grad.clone() for n, p in moe.named_parameters() if p.grad is not None}
        results.append((y.detach(), leaf.grad, gates[-1].grad, gradients))
    fast, fast_x, fast_gates, fast_parameters = results[0]
    slow, slow_x, slow_gates, slow_parameters = results[1]
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast_x, slow_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast_gates, slow_gates, rtol=1e-4, atol=1e-5)
    assert fast_parameters.keys() == slow_parameters.keys()
    for name, gradient in fast_parameters.items():
        torch.testing.assert_close(gradient, slow_parameters[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_experts_pass_gradients_on_and_compute_none_of_their_own(engine, monkeypatch):
    """As in `add-task` with a gradient optimizer: routers train behind and in front of frozen experts."""
    found = []
    for frozen in (False, True):
        moe, x = make_moe(backend=engine), normal(2, 6, WIDTH).requires_grad_()
        moe.experts.requires_grad_(not frozen)
        if frozen and engine == "loop":
            monkeypatch.setattr(experts, "_product_into", None)  # it computes the weights' gradients
        y, _ = moe(x, TASKS[0], Replay())
        (y * normal(*y.shape, seed=1)).sum().backward()
        router = [p.grad for p in moe.router.parameters() if p.grad is not None]
        found.append([x.grad, *router])
        assert all((p.grad is None) == frozen for p in moe.experts.parameters())
    assert len(found[0]) > 1 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_expert_that_no_token_chose_affects_nothing(engine):
    """NaN parameters of experts 0, 3 and 5 (first, middle, last) must not affect any result."""
    chosen = torch.tensor([[1, 2], [2, 4], [4, 1], [2, 1]])
    x, results = normal(1, 4, WIDTH), []
    for poison in (False, True):
        moe = make_moe(backend=engine)
        if poison:
            with torch.no_grad():
                for parameter in moe.experts.parameters():
                    parameter[[0, 3, 5]] = torch.nan
        leaf = x.clone().requires_grad_()
        y, _ = moe(leaf, "one", Fixed(chosen))
        y.square().sum().backward()
        results.append((y, leaf.grad, moe.router.weight["one"].grad, [p.grad for p in moe.experts.parameters()]))
    (clean, clean_x, clean_router, clean_experts), (y, grad_x, router, experts) = results
    assert torch.equal(y, clean) and torch.equal(grad_x, clean_x)
    assert torch.equal(router, clean_router)
    for gradient, expected in zip(experts, clean_experts, strict=True):
        assert torch.equal(gradient, expected)
        assert gradient[[0, 3, 5]].eq(0).all() and gradient[[1, 2, 4]].ne(0).any()


@pytest.mark.parametrize("engine", ENGINES)
def test_experts_run_in_the_dtype_of_autocast(engine):
    moe = make_moe(backend=engine, scale=5000.0)
    x = normal(2, 4, WIDTH)
    exact, routing = moe(x, "one", Replay())
    with torch.autocast("cpu", torch.bfloat16):
        y, rounded = moe(x.bfloat16(), "one", Fixed(routing.experts.flatten(0, 1)))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and rounded.gates.dtype == torch.float32
    assert (y - exact).norm() < 0.03 * exact.norm()
    assert moe.experts.fc1_weight.grad.dtype == torch.float32


def test_a_grouped_shape_that_cannot_be_aligned_is_refused_and_auto_avoids_it():
    mlp = Mlp(6, 24)
    moe = MoE(mlp, MoEConfig(num_experts=2, top_k=1, renormalize_gates=False, backend="grouped"), TASKS, (0, 0))
    with pytest.raises(ConfigError, match="moe.backend = 'grouped'.*16 bytes"):
        moe(normal(1, 3, 6), "one", Replay())
    moe = MoE(mlp, MoEConfig(num_experts=2, top_k=1, renormalize_gates=False), TASKS, (0, 0))
    assert moe(normal(1, 3, 6), "one", Replay())[0].shape == (1, 3, 6)


# --- upcycling ---


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_upcycled_layer_equals_its_ffn_when_gates_are_renormalized(router, scale, bias):
    mlp, x = make_mlp(bias=bias), normal(2, 9, WIDTH)
    options = {"num_experts": 16, "top_k": 4, "router": router, "distinct": False, "bias": bias}
    for task in TASKS:
        y, _ = make_moe(scale=scale, **options)(x, task, Replay())
        torch.testing.assert_close(y, mlp(x), rtol=1e-5, atol=2e-6)
    raw, _ = make_moe(scale=scale, renormalize_gates=False, **options)(x, "one", Replay())
    if scale == 1.0:  # with a saturated softmax the four largest gates sum to 1 in both cases
        assert (raw - mlp(x)).norm() > 0.5 * mlp(x).norm()


@pytest.mark.parametrize("renormalize", [True, False])
def test_upcycling_error_distinguishes_exact_from_inexact_starts(renormalize):
    mlp, norm = make_mlp(), nn.LayerNorm(WIDTH)
    moe = MoE(mlp, MoEConfig(renormalize_gates=renormalize), TASKS, (0, 0)).train()
    error = upcycling_error(moe, mlp, norm, "one")
    assert error < 1e-5 if renormalize else 0.5 < error < 1
    assert moe.training and all(p.grad is None for p in moe.parameters())


def test_init_noise_is_relative_and_seeded_and_does_not_change_the_ffn():
    mlp = make_mlp()
    before = copy.deepcopy(mlp.state_dict())
    first, again, other = (Experts(mlp, MoEConfig(init_noise=0.01), seed) for seed in [(1, 2), (1, 2), (1, 3)])
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.fc1_weight, other.fc1_weight)
    spread = (first.fc1_weight - mlp.fc1.weight).std() / mlp.fc1.weight.std()
    assert 0.009 < spread < 0.011
    assert not torch.equal(first.fc1_weight[0], first.fc1_weight[1])
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


@pytest.mark.parametrize("ratio, slices", [(1, 4), (2, 2)])
def test_smaller_experts_take_every_nth_hidden_unit(ratio, slices):
    mlp = make_mlp()
    experts = Experts(mlp, MoEConfig(num_experts=6, mlp_ratio=ratio), (0,))
    assert experts.fc1_weight.shape == (6, ratio * WIDTH, WIDTH)
    for e in range(6):
        units = [j for j in range(4 * WIDTH) if j % slices == e % slices]
        for mine, j in enumerate(units):
            assert torch.equal(experts.fc1_weight[e, mine], mlp.fc1.weight[j])
            assert torch.equal(experts.fc1_bias[e, mine], mlp.fc1.bias[j])
            assert torch.equal(experts.fc2_weight[e, :, mine], slices * mlp.fc2.weight[:, j])
        assert torch.equal(experts.fc2_bias[e], mlp.fc2.bias)


@pytest.mark.parametrize("cover", [[0, 1, 2, 3], [4, 9, 2, 15], [13, 8, 3, 6]])
def test_ratio_one_is_exact_for_equal_gates_that_cover_every_unit(cover):
    mlp, x = make_mlp(), normal(1, 5, WIDTH)
    moe = MoE(mlp, MoEConfig(mlp_ratio=1), TASKS, (0, 0))
    nn.init.zeros_(moe.router.weight["one"])
    y, _ = moe(x, "one", Fixed(torch.tensor([cover] * 5)))
    torch.testing.assert_close(y, mlp(x), rtol=1e-5, atol=1e-5)
    partial, _ = moe(x, "one", Fixed(torch.tensor([[0, 4, 8, 1]] * 5)))
    assert (partial - mlp(x)).norm() > 0.1 * mlp(x).norm(), "residues 0, 0, 0, 1 are no cover"


def test_upcycling_error_of_ratio_one_is_large():
    mlp = make_mlp()
    moe = MoE(mlp, MoEConfig(mlp_ratio=1), TASKS, (0, 0))
    assert upcycling_error(moe, mlp, nn.LayerNorm(WIDTH), "one") > 0.1


@pytest.mark.parametrize(
    "mlp",
    [SwiGLUPacked(WIDTH, 32), GluMlp(WIDTH, 32), Mlp(WIDTH, 32, norm_layer=nn.LayerNorm)],
    ids=["swiglu", "glu", "normed"],
)
def test_only_a_plain_mlp_can_become_experts(mlp):
    with pytest.raises(ConfigError, match=f"plan.moe_blocks = '{type(mlp).__name__}'"):
        MoE(mlp, MoEConfig(), TASKS, (0, 0))


@pytest.mark.parametrize("ratio", [3, 5, 8])
def test_a_ratio_that_does_not_divide_the_ffn_is_refused(ratio):
    with pytest.raises(ConfigError, match=rf"moe.mlp_ratio = {ratio}.*{ratio * WIDTH}.*32"):
        Experts(make_mlp(), MoEConfig(mlp_ratio=ratio), (0,))


# --- the experts' batch ---


@pytest.mark.parametrize("multiple", [1, 4, 64])
def test_every_assignment_gets_its_own_row_among_those_of_its_expert(multiple):
    generator = torch.Generator().manual_seed(3)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(23)])
    chosen[chosen == 3] = 4  # an expert without tokens (and tokens that chose one expert twice)
    slot, token, counts = sort_by_expert(chosen, 5, multiple)
    assert len(token) == counts.sum() and counts[3] == 0 and (counts % multiple == 0).all()
    assert len(set(slot.tolist())) == chosen.numel()
    ends = counts.cumsum(0)
    for assignment, row in enumerate(slot.tolist()):
        expert = chosen.flatten()[assignment]
        assert ends[expert] - counts[expert] <= row < ends[expert]
        assert token[row] == assignment // 2


def test_padding_changes_neither_value_nor_gradient():
    """On a CPU, bf16 pads the rows of an expert; float32 with the same numbers does not."""
    moe = make_moe()
    x = normal(2, 5, 8)
    results = []
    for precision in (torch.float32, torch.bfloat16):
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            y, _ = moe(leaf, "one", Replay())
        y.float().square().sum().backward()
        results.append([y.float().detach(), leaf.grad, *(p.grad for p in moe.experts.parameters())])
    for exact, padded in zip(*results, strict=True):
        assert (padded - exact).norm() <= 0.03 * exact.norm()


def test_bias_gradients_in_bf16_agree_between_grouped_and_loop():
    """Thousands of rows are summed. A sum in bf16 would stop growing."""
    grads = {}
    for engine in ("loop", "grouped"):
        mlp = make_mlp()
        experts = Experts(mlp, MoEConfig(num_experts=4, top_k=2, mlp_ratio=4, backend=engine), (0,))
        x = torch.randn(3000, mlp.fc1.in_features, generator=torch.Generator().manual_seed(1))
        gates, chosen = torch.rand(3000, 4, generator=torch.Generator().manual_seed(2)).topk(2)
        with torch.autocast("cpu", torch.bfloat16):
            y = experts(x, gates, chosen)
        y.backward(torch.ones_like(y))
        grads[engine] = [experts.fc1_bias.grad, experts.fc2_bias.grad]
    for loop, grouped in zip(*grads.values(), strict=True):
        assert (loop - grouped).norm() < 0.02 * loop.norm()
