"""Linear layers in the compute dtype: no casts of what is constant, no detour on CPUs.

Under autocast, torch casts a frozen float32 weight anew in every step. Here frozen weights may be kept in
the compute dtype alone (`MultitaskViT.keep_frozen_in`), and trained ones are cast once a pass from their
float32 masters. On a CPU in bf16 the product goes to oneDNN with its bias; `F.linear` would first write the
bias to the output and then add the product to it (DeiT-S, 32 x 197 tokens, fc1, two cores: 3.1 -> 2.1 ms).
Where MKL is slow, float32 goes there too.
"""

import torch
from einops import rearrange
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from moe_bsr.cost.ledger import Backward, Held, Ledger
from moe_bsr.runtime import cpu_features as cpu


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the blocks compute in: autocast's type, or the input's own without autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def frozen_matrices(vit: nn.Module) -> list[nn.Parameter]:
    """The frozen parameters of a timm ViT's patch embedding and of its blocks' linear layers."""
    layers = [vit.patch_embed.proj]
    for block in vit.blocks:
        mlp = [block.mlp.fc1, block.mlp.fc2] if isinstance(block.mlp, Mlp) else []
        layers += [block.attn.qkv, block.attn.proj, *mlp]
    return [p for layer in layers for p in layer.parameters(recurse=False) if not p.requires_grad]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, repeats: bool = False) -> Tensor:
    """x weight^T + bias of operands of one type, by the fastest kernel; outside of autograd.

    Args:
        repeats: whether these shapes come again: oneDNN compiles for new ones, which float32 cannot win back.
    """
    fast = (
        x.dtype == torch.bfloat16
        and cpu.onednn_has_bf16()
        or repeats
        and x.dtype == torch.float32
        and cpu.mkl_is_slow()
    )
    if fast and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad weight: of y = x weight^T, the gradient of x, (rows, out) and (out, in) -> (rows, in)."""
    return product(grad, weight.t(), repeats=True) if grad.dtype == torch.float32 else grad @ weight


class _Linear(torch.autograd.Function):
    """Saved for backward: the input, if the weight trains. A cast weight is held beside it, up to the first
    backward: the graph may live on with the output, and a storage may treat what is saved as activations."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, ctx.needs_bias = ctx.needs_input_grad
        copy = weight.to(x.dtype)
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.copy = copy if needs_x else None
        return product(x, copy, None if bias is None else bias.to(x.dtype), repeats=True)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), copy = ctx.saved_tensors, ctx.copy
        ctx.copy = None
        if copy is None and weight is not None:
            copy = weight.to(grad.dtype)
        flat = grad.flatten(0, -2)
        return (
            None if weight is None else input_gradient(flat, copy).view(*grad.shape[:-1], weight.shape[1]),
            None if x is None else flat.t() @ x.flatten(0, -2),
            flat.sum(0) if ctx.needs_bias else None,
        )


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """(..., in) -> (..., out) in the compute dtype."""
    return _Linear.apply(x.to(compute_dtype(x)), layer.weight, layer.bias)


def embed_patches(layer: PatchEmbed, images: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, patches, D), or (B, h, w, D) as timm has it.

    Where types differ, the patch convolution is computed as a product of patches: in bf16 on a CPU, oneDNN's
    convolution would take tens of megabytes of scratch memory for it.
    """
    dtype = compute_dtype(images)
    plain = dtype == images.dtype == layer.proj.weight.dtype
    if plain or layer.output_fmt == "NCHW" and not layer.flatten or images.shape[2:] != layer.img_size:
        return layer(images)
    height, width = layer.patch_size
    pattern = "b (h w) (c p q)" if layer.flatten else "b h w (c p q)"
    x = rearrange(images, f"b c (h p) (w q) -> {pattern}", p=height, q=width).to(dtype)
    return layer.norm(_Linear.apply(x, layer.proj.weight.flatten(1), layer.proj.bias))


def activation_backward(act: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x from that of act(x), which is given up: GELU's takes its place."""
    if isinstance(act, nn.GELU):
        return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=act.approximate, grad_input=grad)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = act(x)
    return torch.autograd.grad(y, x, grad)[0]


class _ActivatedLinear(torch.autograd.Function):
    """Saved for backward: x. What the weight's gradient needs, act(x), is computed from it again."""

    @staticmethod
    def forward(ctx, x: Tensor, act: nn.Module, weight: Tensor, bias: Tensor | None, needs_output: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.act = act
        if not needs_output:
            return no_values(x, len(weight))
        return product(act(x), weight.to(x.dtype), None if bias is None else bias.to(x.dtype), repeats=True)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        of_weight = flat.t() @ ctx.act(x).flatten(0, -2) if ctx.needs_input_grad[2] else None
        back = activation_backward(ctx.act, x, input_gradient(flat, weight.to(x.dtype)).view(x.shape))
        return back, None, of_weight, flat.sum(0) if ctx.needs_input_grad[3] else None, None


def activated_linear(act: nn.Module, layer: nn.Linear, x: Tensor, needs_output: bool = True) -> Tensor:
    """layer(act(x)) of x in the compute dtype, (..., in) -> (..., out); `act` has no parameters.

    As two operations a layer that trains would keep x for the one and act(x) for the other.

    Args:
        valued: whether the values are wanted, or only what the backward pass needs.
    """
    return _ActivatedLinear.apply(x, act, layer.weight, layer.bias, needs_output)


def no_values(x: Tensor, width: int) -> Tensor:
    """Zeros in place of a product of x that nobody looks at: (..., in) -> (..., width), without memory."""
    return x.new_zeros(()).expand(*x.shape[:-1], width)


def linear_bytes(ledger: Ledger, layer: nn.Linear, x: Held, rows: int, needs_x: bool) -> tuple[Held, Backward]:
    """Kept: the input, if the weight trains, and the weight's copy in the compute dtype."""
    outputs, inputs = layer.weight.flatten(1).shape
    trains, size = layer.weight.requires_grad, ledger.size
    weight = outputs * inputs * size
    copy = ledger.make(weight, packable=False) if trains and size == 2 else None
    y = ledger.make(rows * outputs * size)
    ledger.scratch(ledger.product_scratch(rows, inputs, outputs))
    if trains:
        ledger.save(x, "linear inputs")
    if copy is not None and needs_x:
        ledger.save(copy, "weight copies")
    ledger.free(copy)

    def backward(grad: Held) -> Held | None:
        if trains:
            ledger.restore(x)
        out = ledger.make(rows * inputs * size) if needs_x else None
        ledger.scratch(ledger.product_scratch(rows, outputs, inputs) if needs_x else 0)
        if trains:
            of_weight = ledger.make(weight if size == 2 else 0)  # in float32 it is the gradient itself
            ledger.scratch(ledger.weight_gradient_scratch(rows, inputs, outputs))
            ledger.release(x)
            ledger.free(of_weight)
        if copy is not None and needs_x:
            ledger.release(copy)
        ledger.free(grad)
        return out

    return y, backward


def activated_linear_bytes(
    ledger: Ledger, layer: nn.Linear, x: Held, rows: int, needs_output: bool
) -> tuple[Held, Backward]:
    """Kept: x, the values before the activation. Takes x over."""
    outputs, inputs = layer.weight.shape
    size, trains = ledger.size, layer.weight.requires_grad
    copy = outputs * inputs * size if size == 2 and trains else 0
    y = ledger.make(0)
    if needs_output:
        after, cast = ledger.make(x.bytes), ledger.make(copy)
        y = ledger.make(rows * outputs * size)
        ledger.scratch(ledger.product_scratch(rows, inputs, outputs))
        ledger.free(after, cast)
    ledger.save(x, "activation inputs")
    ledger.free(x)

    def backward(grad: Held) -> Held:
        ledger.restore(x)
        of_weight = None
        if trains:
            after = ledger.make(x.bytes)
            of_weight = ledger.make(copy)  # in float32 it is the gradient itself
            ledger.scratch(ledger.weight_gradient_scratch(rows, inputs, outputs))
            ledger.free(after)
        cast, back = ledger.make(copy), ledger.make(x.bytes)
        ledger.scratch(ledger.product_scratch(rows, outputs, inputs))
        ledger.free(cast)
        ledger.release(x)
        ledger.free(of_weight, grad)
        return back

    return y, backward


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.dtype = x.dtype
        return F.linear(x.float(), weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        return (
            (grad @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None,
            None if x is None else grad.t() @ x.float(),
        )


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T of (T, in) in float32 whatever the type of x, which is kept as it came."""
    with torch.autocast(x.device.type, enabled=False):
        return _Float32Linear.apply(x, weight)
