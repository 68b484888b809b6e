"""Patch embedding, computed as a matrix product where timm's convolution would take more memory."""

from einops import rearrange
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
    pattern = "b (h w) (c p q)" if layer.flatten else "b h w (c p q)"
    x = rearrange(images, f"b c (h p) (w q) -> {pattern}", p=height, q=width).to(dtype)
    return layer.norm(linear(x, layer.proj.weight.flatten(1), layer.proj.bias))
