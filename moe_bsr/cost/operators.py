"""Run operators on fake tensors fast: their outputs and their FLOPs.

`FakeTensorMode` computes the outputs of every operator, but needs 0.3 ms per call. A training step consists of a few
hundred different calls, each repeated many times. A call is therefore answered from a table after the first. The key is
the operator with the shapes, strides, dtypes and devices of its tensors and the values of its other arguments.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from moe_bsr.cost import rules

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
"""The only mode of the process, because fake tensors of different modes do not mix."""


def _linear_flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def _grouped_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Each row times its group's matrix, or one product per group for a weight's gradient: 2 x rows x inner x outer."""
    return 2 * a.numel() * b.shape[-1]


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _batched_flops(matrix: Tensor, vector: Tensor, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix.shape)


# Operators that torch's counter lacks. Formulas are called with the arguments and the output (`out_val`).
FLOPS: dict[str, Callable[..., int]] = {
    "mkldnn::_linear_pointwise": _linear_flops,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward_flops,
    "aten::_grouped_mm": _grouped_flops,
    "aten::_addmm_activation": lambda _, a, b, **__: 2 * a.numel() * b.shape[1],
    "aten::mv": _batched_flops,
}


@dataclass(slots=True)
class _New:
    """An output with memory of its own."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True, eq=False)
class Effect:
    """Result of an operator for arguments of certain shapes. Equal arguments share one object.

    Attributes:
        outputs: for each output a `_New`, the index of the tensor argument that is returned, or None. The whole list
            is None if an output is a view of an argument or cannot be described in this way.
        several: type of the returned sequence; None for a single output.
        news: positions of the outputs that have memory of their own.
        name: the operator's, without namespace and overload.
    """

    outputs: list[_New | int | None] | None
    several: type | None
    news: tuple[int, ...]
    flops: int
    name: str


VIEW = Effect(None, None, (), 0, "view")
PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
MAX_EFFECTS = 100_000
_effects: dict[tuple, Effect] = {}
_kinds: dict[tuple, tuple["Effect", list] | None] = {}  # by dtypes and layouts; None: the operator's rule was wrong
_attributes: dict[torch.device, dict[str, Any]] = {}  # attributes of a fake tensor by device
_operators: dict[OpOverload, "_Operator"] = {}


@dataclass(slots=True, eq=False)
class _Operator:
    """Properties of an operator for any arguments. It replaces the operator in keys, whose own hash is slow.

    Attributes:
        is_view: whether all its results are views of its arguments.
        returned: positions and names of the arguments it returns, if it returns only arguments it wrote to; else None.
    """

    is_view: bool
    returned: list[tuple[int, str]] | None


def run(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Effect, bool]:
    """Run an operator on fake tensors, within `FAKE`.

    Returns:
        The operator's result, its effect, and whether this `Effect` object is shared only by calls with equal
        arguments, so that it can be a key.
    """
    operator = _operators.get(func) or _operators.setdefault(func, _Operator(_is_view(func), _returned_arguments(func)))
    tensors: list[Tensor] = []
    values: list[Any] = [operator]
    if not (_add_to_key(values, tensors, args) and (not kwargs or _add_to_key(values, tensors, kwargs.items()))):
        result = func(*args, **kwargs)
        return result, _learn(func, args, kwargs, tensors, result), False
    if operator.is_view:
        device = tensors[0].fake_device
        with in_kernel_invocation_manager(FAKE):
            result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            return _fake(result, device), VIEW, True
        return type(result)(_fake(r, device) for r in result), VIEW, True
    key = tuple(values)
    if len(_effects) >= MAX_EFFECTS:
        _effects.clear()
    known = _effects.get(key)
    if operator.returned is not None:
        if known is None:
            known = _effects[key] = Effect([], None, (), _flops(func, args, kwargs, None), _name(func))
        returned = [args[place] if place < len(args) else kwargs[name] for place, name in operator.returned]
        return returned[0] if len(returned) == 1 else tuple(returned) or None, known, True
    if (known := known or _by_rule(func, args, kwargs, tensors, key)) is None:
        result = func(*args, **kwargs)
        known = _effects[key] = _learn(func, args, kwargs, tensors, result)
        if func is not torch.ops.aten.native_layer_norm.default:
            return result, known, True
        _correct_layer_norm(known, args)
    if known.outputs is None:
        return func(*args, **kwargs), known, True
    outputs = []
    for output in known.outputs:
        if type(output) is _New:
            with torch._C._DisableTorchDispatch():
                made = torch.empty_strided(output.size, output.stride, dtype=output.dtype, device="meta")
            outputs.append(_fake(made, output.device))
        else:
            outputs.append(None if output is None else tensors[output])
    result = known.several(outputs) if known.several is not None else outputs[0] if outputs else None
    return result, known, True


def empty(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> FakeTensor:
    """Return a fake tensor. No dispatch mode sees its allocation."""
    with torch._C._DisableTorchDispatch():
        made = torch.empty(size, dtype=dtype, device="meta")
    return _fake(made, device)


def _fake(memory: Tensor, device: torch.device) -> FakeTensor:
    """`FakeTensor(FAKE, memory, device)` in a fifth of the time: its attributes are the same for a whole device."""
    attributes = _attributes.get(device)
    if attributes is None:
        made = FakeTensor(FAKE, memory, device)
        _attributes[device] = dict(vars(made))
        return made
    made = Tensor._make_subclass(
        FakeTensor,
        memory,
        memory.requires_grad,
        dispatch_device=True,
        device_for_backend_keys=attributes["_fake_device"],
    )
    if FAKE._allow_unsafe_data_ptr_access:
        torch._C._set_warn_deprecated_on_mutable_data_ptr(made)
    else:
        torch._C._set_throw_on_mutable_data_ptr(made)
    vars(made).update(attributes)
    return made


def _is_view(func: OpOverload) -> bool:
    aliases = [r.alias_info for r in func._schema.returns]
    views = bool(aliases) and all(a is not None and not a.is_write for a in aliases)
    return views or func is torch.ops.aten._unsafe_view.default


def _returned_arguments(func: OpOverload) -> list[tuple[int, str]] | None:
    """Return (position, name) of the arguments that an operator returns, if it returns only arguments it wrote to.

    None for all other operators.
    """
    arguments = {
        frozenset(a.alias_info.before_set): (i, a.name)
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    }
    aliases = [r.alias_info for r in func._schema.returns]
    writes = all(a is not None and a.is_write and frozenset(a.before_set) in arguments for a in aliases)
    keeps_layout = torch.Tag.inplace_view not in func.tags and _name(func) not in ("resize_", "set_")
    return [arguments[frozenset(a.before_set)] for a in aliases] if writes and keeps_layout and arguments else None


def _correct_layer_norm(effect: Effect, args: Sequence[Any]) -> None:
    """On a CPU, the statistics of a bf16 input are float32 if the parameters are. torch's fake kernel says bf16."""
    x, _, weight, *_ = args
    if x.fake_device.type == "cpu" and weight is not None:
        for statistics in effect.outputs[1:]:
            statistics.dtype = torch.promote_types(x.dtype, weight.dtype)


def _name(func: OpOverload) -> str:
    return func._schema.name.partition("::")[2]


def _by_rule(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[Tensor], key: tuple
) -> Effect | None:
    """Return the effect for arguments of new sizes, if the operator's rule was right for their dtypes and layouts."""
    if func in rules.OWN:
        first = tensors[0]
        outputs = [
            _New(size, rules.contiguous(size), first.dtype, first.fake_device)
            for size in rules.OWN[func](*args, **kwargs)
        ]
        effect = _effects[key] = Effect(outputs, None, (0,), _flops(func, args, kwargs, None), _name(func))
        return effect
    kind = _kind(func, args, kwargs)
    if _kinds.get(kind) is None or (sizes := rules.sizes(func, args, kwargs, tensors)) is None:
        return None
    like, orders = _kinds[kind]
    outputs = [
        None if size is None else _New(size, rules.strides(size, order), new.dtype, new.device)
        for size, order, new in zip(sizes, orders, like.outputs, strict=True)
    ]
    effect = _effects[key] = Effect(outputs, like.several, like.news, _flops(func, args, kwargs, None), like.name)
    return effect


def _check_rule(
    func: OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: list[Tensor],
    effect: Effect,
    outputs: list[Tensor | None],
) -> None:
    """Compare an operator's rule, if it has one, with what the operator returned, and learn the results' layouts."""
    sizes = rules.sizes(func, args, kwargs, tensors)
    if sizes is None or effect.outputs is None or any(isinstance(o, int) for o in effect.outputs):
        return
    orders = [None if o is None else rules.layout(o) for o in outputs]
    right = sizes == [None if o is None else o.size for o in effect.outputs] and all(
        o is None or o.stride == rules.strides(o.size, order) for o, order in zip(effect.outputs, orders, strict=True)
    )
    kind = _kind(func, args, kwargs)
    _kinds[kind] = (effect, orders) if right and _kinds.get(kind, ()) is not None else None


def _kind(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple:
    """Return a key of dtypes, devices and layouts, without sizes and numbers."""
    values: list[Any] = [func]

    def add(value: Any) -> None:
        if isinstance(value, FakeTensor):
            stride = value.stride()
            values.extend((value.dtype, value.fake_device, rules.layout(value), stride.count(0), stride[-1:] == (1,)))
        elif isinstance(value, list | tuple):
            values.append(len(value))
            for part in value:
                add(part)
        else:
            values.append(type(value) if isinstance(value, float | torch.Generator) or type(value) is int else value)

    for value in (*args, *kwargs.values()):
        add(value)
    return (*values, *kwargs)


def _add_to_key(key: list[Any], tensors: list[Tensor], values: Sequence[Any]) -> bool:
    """Extend the key by arguments. False if one of them is a tensor that is not fake, whose values may matter."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            tensors.append(value)
            key += (value.shape, value.stride(), value.dtype, value.fake_device)
        elif kind is tuple or kind is list:
            key.append(len(value))
            if not _add_to_key(key, tensors, value):
                return False
        elif kind in PLAIN:
            key += (kind, value)  # 1, 1.0 and True are equal, but not alike
        elif issubclass(kind, Tensor):
            return False
        else:
            key.append(kind)
            if kind is not torch.Generator:
                key.append(value)
    return True


def _learn(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[Tensor], result: Any
) -> Effect:
    """Return the effect of a call that has been run."""
    outputs = list(result) if isinstance(result, tuple | list) else [] if result is None else [result]
    flops = _flops(func, args, kwargs, result)
    storages = {t.untyped_storage()._cdata for t in tensors}
    places = {id(t): i for i, t in enumerate(tensors)}
    news = tuple(
        i for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in storages
    )
    kinds: list[_New | int | None] | None = []
    for i, output in enumerate(outputs):
        if output is None:
            kinds.append(None)
        elif id(output) in places:
            kinds.append(places[id(output)])
        elif i in news and type(output) is FakeTensor and output.constant is None:
            kinds.append(_New(tuple(output.shape), output.stride(), output.dtype, output.fake_device))
        else:
            kinds = None
            break
    several = type(result) if isinstance(result, tuple | list) else None
    effect = Effect(kinds, several, news, flops, _name(func))
    _check_rule(func, args, kwargs, tensors, effect, outputs)
    return effect


def _flops(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    if (formula := FLOPS.get(func._schema.name)) is not None:
        return int(formula(*args, **kwargs, out_val=result))
    if (formula := flop_registry.get(func.overloadpacket)) is not None:
        return int(formula(*args, **kwargs, out_val=result))
    return 0
