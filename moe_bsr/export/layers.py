"""Layers of a ViT as ONNX operators: linear, norm, activation, FFN, attention pooling.

Each function takes a graph, a trained module, an input value and the names of the module's tensors, adds nodes to the
graph and returns the output value. A layer of an unknown type is refused by name. Subclasses are not accepted for their
base class, since they may compute something else.

    B images, N tokens, D width, H heads, d width of a head, L latent queries
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from timm import layers as timm_layers
from torch import Tensor, nn

from moe_bsr.config import ConfigError
from moe_bsr.export.graph import Graph
from moe_bsr.model import layers as own_layers
from moe_bsr.model.adapters.adaptformer import AdaptFormer
from moe_bsr.model.adapters.wrapped import Wrapped

INACTIVE = (nn.Identity, nn.Dropout, timm_layers.DropPath, timm_layers.PatchDropout)  # in evaluation


@dataclass(frozen=True, slots=True)
class Names:
    """Prefix of the names of a module's tensors, and the task they belong to ("" if shared)."""

    prefix: str = ""
    owner: str = ""

    def __truediv__(self, name: str) -> "Names":
        return Names(f"{self.prefix}{name}.", self.owner)

    def weight(self, g: Graph, name: str, tensor: Tensor) -> str:
        return g.weight(self.prefix + name, tensor, self.owner)


def unknown(module: nn.Module, names: Names) -> ConfigError:
    return ConfigError(
        f"backbone.name: {names.prefix.rstrip('.')} is a {type(module).__name__}, which cannot be exported to ONNX; "
        "predict with moe_bsr itself"
    )


def linear(g: Graph, layer: nn.Module, x: str, names: Names) -> str:
    """Linear layer: (..., in) -> (..., out). Adapters are merged into the weight."""
    if isinstance(layer, INACTIVE):
        return x
    weight, bias = merged(layer, names)
    return product(g, x, weight, bias, names)


def merged(layer: nn.Module, names: Names) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in) and bias of a linear layer, with its adapter's update merged into them."""
    if isinstance(layer, Wrapped):
        layer = copy.deepcopy(layer).merged()
    if type(layer) not in (nn.Linear, own_layers.Linear):
        raise unknown(layer, names)
    return layer.weight, layer.bias


def product(g: Graph, x: str, weight: Tensor, bias: Tensor | None, names: Names) -> str:
    """x weight^T + bias. The weight is stored as (in, out), as MatMul reads it."""
    y = g.op("MatMul", x, names.weight(g, "weight", weight.t()))
    return y if bias is None else g.op("Add", y, names.weight(g, "bias", bias))


def norm(g: Graph, layer: nn.Module, x: str, names: Names) -> str:
    """Norm over the last axis."""
    if isinstance(layer, INACTIVE):
        return x
    if type(layer) in (nn.LayerNorm, timm_layers.LayerNorm, own_layers.LayerNorm):
        scale = torch.ones(layer.normalized_shape) if layer.weight is None else layer.weight
        inputs = [names.weight(g, "weight", scale)]
        if layer.bias is not None:
            inputs.append(names.weight(g, "bias", layer.bias))
        return g.op("LayerNormalization", x, *inputs, axis=-1, epsilon=layer.eps)
    if type(layer) is timm_layers.RmsNorm:
        mean = g.op("ReduceMean", g.op("Mul", x, x), g.constant([-1]), keepdims=1)
        root = g.op("Sqrt", g.op("Add", mean, g.constant(layer.eps, np.float32)))
        y = g.op("Div", x, root)
        return y if layer.weight is None else g.op("Mul", y, names.weight(g, "weight", layer.weight))
    raise unknown(layer, names)


def _sigmoid_times(g: Graph, x: str, factor: float = 1.0) -> str:
    scaled = x if factor == 1.0 else g.op("Mul", x, g.constant(factor, np.float32))
    return g.op("Mul", x, g.op("Sigmoid", scaled))


ACTIVATIONS: dict[type, Callable[[Graph, nn.Module, str], str]] = {
    nn.GELU: lambda g, layer, x: g.op("Gelu", x, approximate=layer.approximate),
    timm_layers.GELU: lambda g, layer, x: g.op("Gelu", x),
    timm_layers.GELUTanh: lambda g, layer, x: g.op("Gelu", x, approximate="tanh"),
    timm_layers.QuickGELU: lambda g, layer, x: _sigmoid_times(g, x, 1.702),
    nn.SiLU: lambda g, layer, x: _sigmoid_times(g, x),
    nn.ReLU: lambda g, layer, x: g.op("Relu", x),
    nn.Sigmoid: lambda g, layer, x: g.op("Sigmoid", x),
}


def activation(g: Graph, layer: nn.Module, x: str, names: Names) -> str:
    if type(layer) not in ACTIVATIONS:
        raise unknown(layer, names)
    return ACTIVATIONS[type(layer)](g, layer, x)


def feed_forward(g: Graph, mlp: nn.Module, x: str, names: Names) -> str:
    """Dense FFN (..., D) -> (..., D): Mlp, SwiGLU (gated, three layers) or GluMlp (gated, first layer is double)."""
    if type(mlp) in (timm_layers.Mlp, own_layers.Mlp):
        x = activation(g, mlp.act, linear(g, mlp.fc1, x, names / "fc1"), names / "act")
    elif type(mlp) is timm_layers.GluMlp:
        first, second = g.op("Split", linear(g, mlp.fc1, x, names / "fc1"), axis=-1, num_outputs=2, outputs=2)
        gate, value = (second, first) if mlp.gate_last else (first, second)
        x = g.op("Mul", activation(g, mlp.act, gate, names / "act"), value)
    elif type(mlp) is timm_layers.SwiGLU:
        gate = activation(g, mlp.act, linear(g, mlp.fc1_g, x, names / "fc1_g"), names / "act")
        x = g.op("Mul", gate, linear(g, mlp.fc1_x, x, names / "fc1_x"))
    else:
        raise unknown(mlp, names)
    return linear(g, mlp.fc2, norm(g, mlp.norm, x, names / "norm"), names / "fc2")


def beside_ffn(g: Graph, layer: nn.Module, x: str, names: Names) -> str:
    """Adapter parallel to the FFN, (B, N, D) -> (B, N, D). Its output is added to the FFN's."""
    if type(layer) is not AdaptFormer:
        raise unknown(layer, names)
    x = g.op("Relu", linear(g, layer.down, x, names / "down"))
    return g.op("Mul", linear(g, layer.up, x, names / "up"), g.constant(layer.scale, np.float32))


def layer_scale(g: Graph, layer: nn.Module, x: str, names: Names) -> str:
    if isinstance(layer, INACTIVE):
        return x
    if type(layer) not in (own_layers.LayerScale, timm_layers.LayerScale):
        raise unknown(layer, names)
    return g.op("Mul", x, names.weight(g, "gamma", layer.gamma))


def heads_apart(g: Graph, x: str, heads: int, width: int, transposed: bool = False) -> str:
    """(B, N, H d) -> (B, H, N, d), or transposed (B, H, d, N)."""
    x = g.op("Reshape", x, g.constant([0, -1, heads, width // heads]))
    return g.op("Transpose", x, perm=[0, 2, 3, 1] if transposed else [0, 2, 1, 3])


def heads_joined(g: Graph, x: str, width: int) -> str:
    """(B, H, N, d) -> (B, N, H d)."""
    return g.op("Reshape", g.op("Transpose", x, perm=[0, 2, 1, 3]), g.constant([0, -1, width]))


def tokens_from(g: Graph, x: str, start: int, end: int | None = None) -> str:
    """x[:, start:end] of (B, N, D)."""
    end = np.iinfo(np.int64).max if end is None else end
    return g.op("Slice", x, g.constant([start]), g.constant([end]), g.constant([1]))


def attention_pool(g: Graph, pool: nn.Module, x: str, names: Names) -> str:
    """Pooling by attention of learned queries to all tokens (SigLIP): (B, N, D) -> (B, D)."""
    if type(pool) is not timm_layers.AttentionPoolLatent or pool.pool not in ("token", "avg"):
        raise unknown(pool, names)
    if pool.pos_embed is not None:
        x = g.op("Add", x, names.weight(g, "pos_embed", pool.pos_embed))
    width = pool.num_heads * pool.head_dim
    with torch.no_grad():  # the queries are the same for every image: (1, H, L, d)
        q = pool.q(pool.latent.float()).reshape(1, pool.latent_len, pool.num_heads, pool.head_dim).transpose(1, 2)
        q = pool.q_norm(q) * pool.scale
    k, v = g.op("Split", linear(g, pool.kv, x, names / "kv"), axis=-1, num_outputs=2, outputs=2)
    if isinstance(pool.k_norm, INACTIVE):
        k = heads_apart(g, k, pool.num_heads, width, transposed=True)
    else:
        k = norm(g, pool.k_norm, heads_apart(g, k, pool.num_heads, width), names / "k_norm")
        k = g.op("Transpose", k, perm=[0, 1, 3, 2])
    weights = g.op("Softmax", g.op("MatMul", names.weight(g, "queries", q), k), axis=-1)
    y = heads_joined(g, g.op("MatMul", weights, heads_apart(g, v, pool.num_heads, width)), width)
    y = linear(g, pool.proj, y, names / "proj")
    if pool.mlp is not None:
        y = g.op("Add", y, feed_forward(g, pool.mlp, norm(g, pool.norm, y, names / "norm"), names / "mlp"))
    if pool.pool == "token":
        return g.op("Squeeze", tokens_from(g, y, 0, 1), g.constant([1]))
    return g.op("ReduceMean", y, g.constant([1]), keepdims=0)
