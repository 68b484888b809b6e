"""Adapters that wrap linear layers of a block. They can be merged into plain layers, which compute the same."""

from collections.abc import Callable, Iterable

from torch import nn

from moe_bsr.config import require
from moe_bsr.model.layers import Linear

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class Wrapped(nn.Module):
    """A layer in place of a linear layer, (..., in) -> (..., out). `new` lists the parameters that it adds."""

    new: list[nn.Parameter]

    def merged(self) -> Linear:
        """Return a plain layer that computes the same. The wrapped layer's own tensors may be overwritten."""
        raise NotImplementedError


def checked(layers: Iterable[str]) -> tuple[str, ...]:
    """Return the option `layers` as a tuple, which makes options hashable.

    Raises:
        ConfigError: no layer, or one that blocks do not have.
    """
    layers = list(layers)
    unknown = sorted(set(layers) - set(LAYERS))
    require(bool(layers) and not unknown, "adapter.layers", layers, f"some of {', '.join(LAYERS)}")
    return tuple(layers)


def wrap(block: nn.Module, layers: Iterable[str], make: Callable[[nn.Linear, str], Wrapped]) -> list[nn.Parameter]:
    """Replace linear layers of a block by `make(layer, its name)`, and return the new parameters.

    Raises:
        ConfigError: the block has no such layer, for example because its FFN is a mixture of experts.
    """
    parameters = []
    for path in layers:
        parent, _, name = path.rpartition(".")
        owner = block.get_submodule(parent)
        base = getattr(owner, name, None)
        require(isinstance(base, nn.Linear), "adapter.layers", path, "this block has no such linear layer")
        wrapped = make(base, path)
        setattr(owner, name, wrapped)
        parameters += wrapped.new
    return parameters
