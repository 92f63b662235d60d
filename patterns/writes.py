"""What an in-place operator computes, as a functional one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from .emit import emit, shape_arguments
from .literals import number_of
from .nodes import same_size

aten = torch.ops.aten

Emit = Callable[[fx.Graph, fx.Node, fx.Node, tuple[Any, ...], dict[str, Any]], fx.Node]


@dataclass(frozen=True, eq=False)
class Write:
    """`node` writes to `target`, its first argument, all of it, and returns it."""

    node: fx.Node
    target: fx.Node
    functional: Emit

    def emit(self, graph: fx.Graph, old: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """What is in `target` after the write.

        Args:
            graph: the node goes to its insertion point.
            old: what was in it before.
            args, kwargs: those of `node`, up to date.
        """
        new = self.functional(graph, self.node, old, (old, *args[1:]), kwargs)
        before, after = old.meta["val"], new.meta["val"]
        if after.dtype != before.dtype:
            new = emit(graph, self.node, aten.to.dtype, new, before.dtype)
        if before.is_contiguous() and not after.is_contiguous():
            # Memory written in place keeps its strides, and a view of it may need them.
            new = emit(graph, self.node, aten.contiguous.default, new)
        return new


def write_of(node: fx.Node, autocast: bool) -> Write | None:
    """How to do without the in-place operator `node`, None if that is not known.

    Args:
        node: an operator with a written argument.
        autocast: autocast may be on where it runs; it acts on functional operators only.
    """
    if not isinstance(node.target, OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    written = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if written != [node.target._schema.arguments[0].name]:
        return None
    target = node.args[0]
    special = _SPECIAL.get(node.target.overloadpacket)
    if special is not None:
        return Write(node, target, special)
    functional = _functional(node.target)
    if functional is None or (autocast and functional.overloadpacket in _AUTOCAST_TO_FLOAT32):
        return None

    def call(graph: fx.Graph, node: fx.Node, old: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        return emit(graph, node, functional, *args, **kwargs)

    return Write(node, target, call)


def _functional(target: OpOverload) -> OpOverload | None:
    """`aten.relu` for `aten.relu_`, `aten.__or__` for `aten.__ior__`: element by element, or moving elements, only."""
    name = target.overloadpacket.__name__
    if name.startswith("__i") and name.endswith("__"):
        name = f"__{name[3:]}"
    elif name.endswith("_"):
        name = name[:-1]
    else:
        return None
    packet = getattr(getattr(torch.ops, target.namespace), name, None)
    functional = getattr(packet, target._overloadname, None) if isinstance(packet, OpOverloadPacket) else None
    if functional is None or functional._schema.is_mutable:
        return None
    pointwise = torch.Tag.pointwise in functional.tags or name.startswith("__")
    random = torch.Tag.nondeterministic_seeded in functional.tags and packet is not aten.dropout
    return functional if (pointwise or packet in _MOVING) and not random else None


def _fill(graph: fx.Graph, node: fx.Node, old: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    value = args[1] if len(args) > 1 else kwargs["value"]
    number = number_of(value)
    if number is not None:
        return emit(graph, node, aten.full_like.default, old, number)
    return _copy(graph, node, old, (old, value), {})


def _zero(graph: fx.Graph, node: fx.Node, old: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    return emit(graph, node, aten.full_like.default, old, 0)


def _copy(graph: fx.Graph, node: fx.Node, old: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    source = args[1] if len(args) > 1 else kwargs["src"]
    before, value = old.meta["val"], source.meta["val"]
    if value.dtype != before.dtype or value.device != before.device:
        source = emit(graph, node, aten.to.device, source, before.device, before.dtype)
    if len(value.shape) != len(before.shape) or not all(map(same_size, value.shape, before.shape)):
        source = emit(graph, node, aten.expand.default, source, shape_arguments(graph, old))
    # A copy of its own, as the memory is: the source may be written later.
    return emit(graph, node, aten.clone.default, source, memory_format=torch.contiguous_format)


def _index_put(graph: fx.Graph, node: fx.Node, old: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """`x[mask] = value` with one boolean mask over the leading dimensions is a `where`."""
    given = dict(zip((a.name for a in node.target._schema.arguments), args, strict=False)) | kwargs  # type: ignore[union-attr]
    indices, value = given["indices"], given["values"]
    mask = indices[0]
    plain = not given.get("accumulate", False) and mask is not None and all(i is None for i in indices[1:])
    rank = old.meta["val"].dim()
    if plain and mask.meta["val"].dtype == torch.bool and value.meta["val"].dim() <= rank - mask.meta["val"].dim():
        for _ in range(rank - mask.meta["val"].dim()):
            mask = emit(graph, node, aten.unsqueeze.default, mask, -1)
        number = number_of(value)
        if number is not None:
            return emit(graph, node, aten.masked_fill.Scalar, old, mask, number)
        return emit(graph, node, aten.where.self, mask, value, old)
    return emit(graph, node, aten.index_put.default, old, indices, value, given.get("accumulate", False))


_SPECIAL: dict[Any, Emit] = {
    aten.fill_: _fill,
    aten.zero_: _zero,
    aten.copy_: _copy,
    aten.index_put_: _index_put,
}

_MOVING = frozenset(
    {
        aten.dropout,
        aten.masked_fill,
        aten.masked_scatter,
        aten.index_fill,
        aten.index_add,
        aten.index_copy,
        aten.scatter,
        aten.scatter_add,
        aten.tril,
        aten.triu,
        aten.logical_and,
        aten.logical_or,
        aten.logical_not,
        aten.logical_xor,
        aten.relu,
    }
)

# Pointwise operators that autocast runs in float32 although their in-place form runs in the dtype of its argument.
_AUTOCAST_TO_FLOAT32 = frozenset(
    {
        aten.acos,
        aten.asin,
        aten.cosh,
        aten.erfinv,
        aten.exp,
        aten.expm1,
        aten.log,
        aten.log10,
        aten.log2,
        aten.log1p,
        aten.reciprocal,
        aten.rsqrt,
        aten.sinh,
        aten.tan,
        aten.pow,
        aten.softplus,
        aten.addcdiv,
        aten.addcmul,
        aten.atan2,
        aten.lerp,
    }
)
