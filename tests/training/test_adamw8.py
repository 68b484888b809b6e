"""AdamW with 8-bit moments: the error of the codes, and the distance of the weights from AdamW's."""

import pytest
import torch
from tiny_models import make_model, normal
from torch import nn

from moe_bsr.config import TrainConfig
from moe_bsr.training.adamw8 import (
    BLOCK,
    CHUNK,
    AdamW8,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)
from moe_bsr.training.optim import make_optimizer, state_of

OFFSETS = [0.0, 0.3, 0.999]


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_error_of_a_moment_is_at_most_one_step_of_its_code(offset):
    """The codes are of roots: one step is 1 / 127 of the square root, or 1 / 255 of the fourth root."""
    values = normal(3, BLOCK) * 10 ** normal(3, BLOCK, seed=1)
    scale, offset = values.abs().amax(1, keepdim=True), torch.tensor(offset)
    found = decode_first(encode_first(values, scale, offset), scale)
    roots = [(x / scale).abs().sqrt().copysign(x) for x in (values, found)]
    assert (roots[1] - roots[0]).abs().max() <= 1 / 127 + 1e-6
    square = values.square()
    scale = square.amax(1, keepdim=True)
    found = decode_second(encode_second(square, scale, offset), scale)
    roots = [(x / scale) ** 0.25 for x in (square, found)]
    assert (roots[1] - roots[0]).abs().max() <= 1 / 255 + 1e-6
    assert found.min() > 0  # an update divides by its root


def test_zeros_stay_zero():
    zeros, scale = torch.zeros(2, BLOCK), torch.zeros(2, 1)
    for offset in map(torch.tensor, OFFSETS):
        assert not decode_first(encode_first(zeros, scale, offset), scale).any()
        assert not decode_second(encode_second(zeros, scale, offset), scale).any()


def descend(kind: type, steps: int, decades: float, shape=(7, 100)) -> tuple[nn.Parameter, torch.Tensor]:
    """Descend on a noisy quadratic with gradients over `decades` orders of magnitude; return parameter and change."""
    draws = torch.Generator().manual_seed(0)
    start, target, scale = (torch.randn(shape, generator=draws) for _ in range(3))
    parameter = nn.Parameter(start.clone())
    optimizer = kind([parameter], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        noise = torch.randn(shape, generator=draws)
        parameter.grad = 10 ** (decades * scale.sigmoid()) * (parameter.detach() - target + noise)
        optimizer.step()
    return parameter, parameter.detach() - start


@pytest.mark.parametrize(("steps", "decades", "bound"), [(1, 3, 1e-6), (20, 0, 0.02), (20, 2, 0.05), (300, 2, 0.05)])
def test_weights_stay_close_to_those_of_adamw(steps, decades, bound):
    (_, expected), (_, found) = (descend(kind, steps, decades) for kind in (torch.optim.AdamW, AdamW8))
    assert (found - expected).norm() <= bound * expected.norm()


def test_the_second_moment_decays_when_gradients_become_zero():
    """An update changes it by a thousandth; neighboring codes differ by several hundredths."""
    parameters = [nn.Parameter(torch.zeros(BLOCK)) for _ in range(2)]
    optimizers = [kind([p]) for kind, p in zip((torch.optim.AdamW, AdamW8), parameters, strict=True)]
    for step in range(900):
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = normal(BLOCK, seed=step)
            if step > 200:
                parameter.grad[BLOCK // 2 :] = 0
            optimizer.step()
    state = optimizers[1].state[parameters[1]]
    found = decode_second(state["exp_avg_sq"], state["exp_avg_sq_scale"])[0]
    ratio = found / optimizers[0].state[parameters[0]]["exp_avg_sq"]
    assert 0.75 < ratio.min() and ratio.max() < 1.25


def test_an_update_does_not_depend_on_how_a_parameter_is_split():
    """More values than one chunk of an update has, and a last block that is not full."""
    values = CHUNK * BLOCK + BLOCK + 10
    whole, parts = (nn.Parameter(normal(values)) for _ in range(2))
    pieces = [nn.Parameter(p.detach().clone()) for p in parts.split(BLOCK * 100)]
    one, many = AdamW8([whole]), AdamW8(pieces)
    for seed in range(2):
        gradient = normal(values, seed=seed)
        whole.grad = gradient.clone()
        for piece, g in zip(pieces, gradient.split(BLOCK * 100), strict=True):
            piece.grad = g.clone()
        one.step()
        many.step()
    assert torch.equal(whole, torch.cat(pieces))


@pytest.mark.parametrize("kind", ["adamw", "adamw8", "sgd", "lbfgs"])
def test_the_predicted_optimizer_state_is_the_actual_one(kind):
    model = make_model(moe_blocks=(1,))
    optimizer = make_optimizer(model, TrainConfig(optimizer=kind))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    sizes = []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        state = {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
        forecast = state_of(optimizer, parameter)
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {k: (v.shape, v.dtype) for k, v in forecast.items()}
        sizes.append(sum(v.nbytes for v in state.values()) / (4 * -(-parameter.numel() // BLOCK) * BLOCK))
    assert kind != "adamw8" or max(sizes) < 0.55  # of the padded float32 parameter: two bytes instead of four
