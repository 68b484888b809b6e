"""timm's layers with a forward that uses our kernels. Parameters and their names stay the same.

`adopt` changes the class of known layers in place, so every published checkpoint and state dict stays valid. Any other
module in such a place (an adapter's wrapper, a quantized layer, a layer with hooks) is called like any module. Its
weights are never read directly.
"""

import torch
from timm import layers as timm_layers
from timm.models.vision_transformer import LayerScale as TimmLayerScale
from torch import Tensor, nn

from moe_bsr.ops.attention import attention, join_heads, split_heads
from moe_bsr.ops.first_attention import first_attention
from moe_bsr.ops.linear import activated_linear, linear
from moe_bsr.ops.merging import mean_keys
from moe_bsr.ops.norm import layer_norm
from moe_bsr.ops.tokens import received_attention

Criteria = tuple[Tensor, ...]  # scores or keys by which tokens are dropped or merged: see `Attention.forward`


class Linear(nn.Linear):
    """(..., in) -> (..., out) in the compute dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """Compute only the given outputs: (..., in) -> (..., number of these outputs)."""
        return linear(x, self.weight[outputs], None if self.bias is None else self.bias[outputs])

    def activated(self, act: nn.Module, x: Tensor, needs_output: bool = True) -> Tensor:
        """Compute the layer for act(x), saving only x for the backward pass: (..., in) -> (..., out)."""
        return activated_linear(act, x, self.weight, self.bias, needs_output)


class LayerNorm(timm_layers.LayerNorm):
    """Norm over the last dimension, in the dtype of x. Under autocast on a GPU it uses timm's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, self.eps)


class LayerScale(TimmLayerScale):
    """Scale in the dtype of x. Float32 factors would promote bf16 tokens to float32 in all later blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.to(x.dtype)


class Mlp(timm_layers.Mlp):
    """The two-layer FFN."""

    def forward(self, x: Tensor, needs_output: bool = True) -> Tensor:
        """Compute the FFN, (B, N, D) -> (B, N, D).

        Args:
            needs_output: False if only the graph is needed, as in recomputation; the last product may be skipped.
        """
        return feed_forward(self, x, needs_output)


def feed_forward(mlp: Mlp, x: Tensor, needs_output: bool = True) -> Tensor:
    """Compute `Mlp.forward` as a function, which can free x early. A module call would keep x alive to its end."""
    x = mlp.fc1(x)
    if torch.is_grad_enabled() and isinstance(mlp.norm, nn.Identity) and takes_activation(mlp.fc2):
        return mlp.fc2.activated(mlp.act, x, needs_output)
    x = mlp.act(x)
    return mlp.fc2(mlp.norm(x))


class Attention(timm_layers.Attention):
    """Multi-head attention that can also return how much attention each token gets."""

    def forward(
        self,
        x: Tensor,
        *,
        scores: bool = False,
        has_class_token: bool = True,
        attached: bool = True,
        keys: bool = False,
        bias: Tensor | None = None,
        first_alone: bool = False,
    ) -> tuple[Tensor, Criteria]:
        """Compute the attention. No N x N map is saved.

        Args:
            x: (B, N, D).
            scores: also return the class token's attention, mean over heads, as probabilities and logits. Without a
                class token it is the mean attention that each token receives.
            attached: let gradients flow through the probabilities.
            keys: return the keys instead, mean over heads, detached.
            bias: (B, N) float32, added to the logits of each key; it cannot be combined with `scores`.
            first_alone: compute only the first token.
        Returns:
            (B, N, D), or (B, 1, D) with `first_alone`; and a tuple: with `scores` probabilities and logits, each (B, N)
            float32; with `keys` the keys (B, N, d) float32; otherwise, and with `first_alone`, empty.
        """
        if first_alone:
            return self._of_first(x, bias), ()
        qkv = self._project(x)
        y, *criteria = attention(qkv, self.num_heads, self.scale, scores and has_class_token, attached, bias)
        if keys:
            criteria = [mean_keys(qkv, self.num_heads)]
        if scores and not has_class_token:
            q, k, _ = split_heads(qkv, self.num_heads)
            with torch.set_grad_enabled(attached and torch.is_grad_enabled()):
                criteria = received_attention(q, k, self.scale)
        del qkv
        return self._end(y, x), tuple(criteria) if scores or keys else ()

    def _end(self, y: Tensor, x: Tensor) -> Tensor:
        """Apply norm, gate and projection to the attention product y of the tokens x, both (B, n, D)."""
        y = self.norm(y)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj(y)

    def _of_first(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the first token, (B, N, D) -> (B, 1, D), from the keys and values of all tokens."""
        first, inner = x[:, :1], self.num_heads * self.head_dim
        if type(self.qkv) is Linear and not has_hooks(self.qkv):
            q, kv = self.qkv.part(first, slice(inner)), self.qkv.part(x, slice(inner, None))
        else:  # for example an adapter's wrapper
            qkv = self.qkv(x)
            q, kv = qkv[:, :1, :inner].contiguous(), qkv[..., inner:].contiguous()
        if not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)):
            q = self.q_norm(q.unflatten(2, (self.num_heads, -1))).flatten(2)
            k = self.k_norm(kv[..., :inner].unflatten(2, (self.num_heads, -1))).flatten(2)
            kv = torch.cat([k, kv[..., inner:]], 2)
        return self._end(first_attention(q, kv, self.num_heads, self.scale, bias), first)

    def _project(self, x: Tensor) -> Tensor:
        """Return normalized queries, keys and values side by side: (B, N, D) -> (B, N, 3 D)."""
        qkv = self.qkv(x)
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            return qkv
        q, k, v = split_heads(qkv, self.num_heads)
        return torch.cat([join_heads(t) for t in (self.q_norm(q), self.k_norm(k), v)], -1)


ADOPTED = {
    nn.Linear: Linear,
    timm_layers.LayerNorm: LayerNorm,
    timm_layers.Mlp: Mlp,
    timm_layers.Attention: Attention,
    TimmLayerScale: LayerScale,
}


def adopt(module: nn.Module) -> None:
    """Switch the layers of a block to our forward, if their type is exactly one of those above."""
    for layer in module.modules():
        ours = ADOPTED.get(type(layer))
        if ours is not None and not getattr(layer, "inplace", False):
            layer.__class__ = ours


def has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def takes_activation(layer: nn.Module) -> bool:
    """Return whether `layer.activated` may be used: its own class defines it, and the layer has no hooks."""
    return "activated" in vars(type(layer)) and not has_hooks(layer)
