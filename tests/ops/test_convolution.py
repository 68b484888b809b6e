"""Convolution with a folded batch norm, and ReLU that keeps one bit per value, against plain PyTorch."""

import pytest
import torch
from tiny_models import normal, saved_for_backward
from torch import nn

from moe_bsr import ops
from moe_bsr.ops.convolution import normed_convolution, pack_bits, relu, unpack_bits


def layers(stride=1, groups=1, kernel=3) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv, norm = nn.Conv2d(6, 8, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(8)
    with torch.no_grad():
        conv.weight.copy_(0.3 * normal(*conv.weight.shape))
        for seed, tensor in enumerate((norm.weight, norm.bias, norm.running_mean), start=1):
            tensor.copy_(normal(8, seed=seed))
        norm.weight[3] = 0.0  # a channel with scale zero still has a gradient of its scale
        norm.running_var.copy_(0.5 + normal(8, seed=4).square())
    return conv, norm


def run(x, conv, norm):
    """Return the result, and the gradients of all tensors that require one."""
    y = relu(normed_convolution(x, conv, norm))
    leaves = [t for t in (x, conv.weight, norm.weight, norm.bias) if t.requires_grad]
    return y.detach(), *torch.autograd.grad((y * normal(*y.shape, seed=9)).sum(), leaves)


@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("scale", "shift"), ("weight", "scale"), ("x", "scale")])
@pytest.mark.parametrize("shape", [{}, {"stride": 2}, {"groups": 2}, {"kernel": 1, "stride": 2}], ids=str)
def test_result_and_gradients_equal_a_convolution_and_a_norm(shape, frozen):
    conv, norm = layers(**shape)
    x = normal(3, 6, 7, 7).requires_grad_("x" not in frozen)
    for name, parameter in (("weight", conv.weight), ("scale", norm.weight), ("shift", norm.bias)):
        parameter.requires_grad_(name not in frozen)
    ours = run(x, conv, norm)
    with ops.reference():
        theirs = run(x, conv, norm)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_frozen_layer_keeps_one_bit_per_value_and_a_trained_one_also_its_input():
    conv, norm = layers()
    x = normal(4, 6, 8, 8).requires_grad_()
    parameters = [conv.weight, norm.weight, norm.bias]

    def kept() -> int:
        saved = {t.data_ptr(): t for t in saved_for_backward(lambda: relu(normed_convolution(x, conv, norm)))}
        others = [t for t in saved.values() if t is not conv.weight and t.numel() > 8]  # 8 channels
        return sum(t.nbytes for t in others)

    outputs = 4 * 8 * 8 * 8
    assert kept() == outputs // 8 + x.nbytes
    for parameter in parameters[:2]:
        parameter.requires_grad_(False)
    assert kept() == outputs // 8  # a trained shift needs no saved tensor
    norm.bias.requires_grad_(False)
    assert kept() == outputs // 8


@pytest.mark.parametrize("shape", [(8,), (13,), (3, 5, 7), (2, 64)])
def test_packed_bits_are_restored(shape):
    true = normal(*shape) > 0
    packed = pack_bits(true)
    assert packed.dtype == torch.uint8 and len(packed) == -(-true.numel() // 8)
    assert torch.equal(unpack_bits(packed, true.shape), true)


def test_under_autocast_the_result_is_bf16():
    conv, norm = layers()
    x = normal(3, 6, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = relu(normed_convolution(x, conv, norm))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), relu(normed_convolution(x, conv, norm)), rtol=0.05, atol=0.1)
