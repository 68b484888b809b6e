"""Patch embedding, computed as a matrix product where timm's convolution would take more memory."""

from timm.layers import PatchEmbed
from torch import Tensor

from moe_bsr import ops
from moe_bsr.ops.linear import compute_dtype, linear


def embed_patches(layer: PatchEmbed, images: Tensor) -> Tensor:
    """Embed images (B, C, S, S) as (B, patches, D), or as (B, h, w, D) if the layer does not flatten.

    The reference is timm's own forward. If the compute dtype differs from that of the images or weights, the
    convolution is computed as a matrix product of patches: in bf16 on a CPU, oneDNN's convolution would take tens of
    megabytes of scratch memory.
    """
    dtype = compute_dtype(images)
    plain = dtype == images.dtype == layer.proj.weight.dtype
    unknown = (layer.output_fmt == "NCHW" and not layer.flatten) or images.shape[2:] != layer.img_size
    if plain or unknown or ops.is_reference():
        return layer(images)
    height, width = layer.patch_size
    cut = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, h, p, w, q)
    x = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).to(dtype)
    x = x.flatten(1, 2) if layer.flatten else x
    return layer.norm(linear(x, layer.proj.weight.flatten(1), layer.proj.bias))
