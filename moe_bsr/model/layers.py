"""timm's layers with our kernels behind them: same parameters, same names, another forward.

`adopt` changes the class of the layers it knows, in place, so that every published checkpoint and every state
dict stays valid. Whatever else stands in such a place (an adapter's wrapper, a quantized layer, a layer with
hooks) is called as any module is: its weights are never taken out of it.
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

Given = tuple[Tensor, ...]  # what the next step selects tokens by: see `Attention.forward`


class Linear(nn.Linear):
    """(..., in) -> (..., out) in the compute dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """Some of the outputs alone: (..., in) -> (..., number of them)."""
        return linear(x, self.weight[outputs], None if self.bias is None else self.bias[outputs])

    def activated(self, act: nn.Module, x: Tensor, needs_output: bool = True) -> Tensor:
        """The layer of act(x), for whose backward pass x alone is kept: (..., in) -> (..., out)."""
        return activated_linear(act, x, self.weight, self.bias, needs_output)


class LayerNorm(timm_layers.LayerNorm):
    """Over the last dimension, in the type of x; under a GPU's autocast timm's own, which knows what type it leaves."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, self.eps)


class LayerScale(TimmLayerScale):
    """Scales in the type of x: float32 factors would widen a bf16 stream for all that follows."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.to(x.dtype)


class Mlp(timm_layers.Mlp):
    """The two-layer FFN."""

    def forward(self, x: Tensor, needs_output: bool = True) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Args:
            needs_output: False leaves the last product out where that saves work: for a block that runs again
                for its graph alone.
        """
        return feed_forward(self, x, needs_output)


def feed_forward(mlp: Mlp, x: Tensor, needs_output: bool = True) -> Tensor:
    """`Mlp.forward` as a function, which lets go of x once it is used: a module's call would hold it to the end."""
    x = mlp.fc1(x)
    if torch.is_grad_enabled() and isinstance(mlp.norm, nn.Identity) and takes_activation(mlp.fc2):
        return mlp.fc2.activated(mlp.act, x, needs_output)
    x = mlp.act(x)
    return mlp.fc2(mlp.norm(x))


class Attention(timm_layers.Attention):
    """Multi-head attention that can tell how much attention each token gets."""

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
    ) -> tuple[Tensor, Given]:
        """(B, N, D) -> (B, N, D), and what is asked for of the tokens; no N x N map is kept.

        Args:
            scores: asks for probabilities and logits, each (B, N) float32, of the class token's attention, mean over
                heads, or without a class token of the mean attention that each token receives.
            attached: whether the probabilities carry a gradient.
            keys: asks for the keys, mean over heads, (B, N, d) float32 without a gradient.
            bias: (B, N) float32, added to the logits of each key; not together with `scores`.
            first_alone: whether only the first token is wanted, (B, 1, D), and nothing else.
        """
        if first_alone:
            return self._of_first(x, bias), ()
        qkv = self._project(x)
        y, *given = attention(qkv, self.num_heads, self.scale, scores and has_class_token, attached, bias)
        if keys:
            given = [mean_keys(qkv, self.num_heads)]
        if scores and not has_class_token:
            q, k, _ = split_heads(qkv, self.num_heads)
            with torch.set_grad_enabled(attached and torch.is_grad_enabled()):
                given = received_attention(q, k, self.scale)
        del qkv
        return self._end(y, x), tuple(given) if scores or keys else ()

    def _end(self, y: Tensor, x: Tensor) -> Tensor:
        """What comes after the attention product y of the tokens x, both (B, n, D)."""
        y = self.norm(y)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj(y)

    def _of_first(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, 1, D): keys and values of all tokens, everything else of the first."""
        first, inner = x[:, :1], self.num_heads * self.head_dim
        if type(self.qkv) is Linear and not has_hooks(self.qkv):
            q, kv = self.qkv.part(first, slice(inner)), self.qkv.part(x, slice(inner, None))
        else:  # an adapter's wrapper, say, which knows best how to compute it
            qkv = self.qkv(x)
            q, kv = qkv[:, :1, :inner].contiguous(), qkv[..., inner:].contiguous()
        if not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)):
            q = self.q_norm(q.unflatten(2, (self.num_heads, -1))).flatten(2)
            k = self.k_norm(kv[..., :inner].unflatten(2, (self.num_heads, -1))).flatten(2)
            kv = torch.cat([k, kv[..., inner:]], 2)
        return self._end(first_attention(q, kv, self.num_heads, self.scale, bias), first)

    def _project(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, 3 D) queries, keys and values, as the attention product takes them."""
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
    """Give the layers within a block our forward, where their type is exactly one that we know."""
    for layer in module.modules():
        ours = ADOPTED.get(type(layer))
        if ours is not None and not getattr(layer, "inplace", False):
            layer.__class__ = ours


def has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def takes_activation(layer: nn.Module) -> bool:
    """Whether the layer can be handed the activation before it: its own class says how, and nobody hooked into it."""
    return "activated" in vars(type(layer)) and not has_hooks(layer)
