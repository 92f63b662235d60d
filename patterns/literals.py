"""Numbers that a graph carries as 0-d tensors: `torch.tensor(-1e9)`, `torch.sqrt(torch.tensor(64.0))`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .aliasing import aliased_inputs, written_nodes

aten = torch.ops.aten

_COPIES = (
    aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach_.default, aten.detach.default, aten.alias.default,
    aten.clone.default,
)  # fmt: skip
_ARITHMETIC = (
    aten.sqrt, aten.rsqrt, aten.reciprocal, aten.pow, aten.mul, aten.div, aten.neg, aten.to, aten._to_copy,
    aten.full, aten.scalar_tensor, aten.full_like, aten.zeros, aten.ones, aten.new_full, aten.new_zeros, aten.new_ones,
    aten.expand, aten.zeros_like, aten.ones_like, aten.unsqueeze, aten.view,
)  # fmt: skip


def number_of(value: Any) -> int | float | bool | None:
    """The number that `value` is everywhere: a Python number, or a tensor whose elements are known and all the same.

    A tensor is known if it is computed from literals alone.  None if it is not known.
    """
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, fx.Node):
        return None
    tensor = _evaluate(value, depth=8)
    if tensor is None or tensor.is_complex():
        return None
    return tensor.item()  # type: ignore[no-any-return]


def _evaluate(node: fx.Node, depth: int) -> torch.Tensor | None:
    """One element of the constant tensor `node`; shapes do not matter, since all elements are the same."""
    if depth == 0 or _is_written(node):
        return None
    if node.op == "get_attr":
        return _literal(node)
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target in _COPIES:
        return _evaluate(node.args[0], depth - 1) if isinstance(node.args[0], fx.Node) else None
    packet = node.target.overloadpacket
    dtype = getattr(node.meta.get("val"), "dtype", None)
    if packet not in _ARITHMETIC or dtype is None:
        return None
    factory = _FILLED_WITH.get(packet)
    if factory is not None:
        value = factory if isinstance(factory, int) else node.args[-1]
        return torch.tensor(value, dtype=dtype) if isinstance(value, (int, float)) else None
    if packet in (aten.expand, aten.unsqueeze, aten.view):
        return _evaluate(node.args[0], depth - 1) if isinstance(node.args[0], fx.Node) else None
    operands = [_evaluate(a, depth - 1) if isinstance(a, fx.Node) else a for a in node.args]
    if any(a is None for a in operands):
        return None
    if packet in (aten.to, aten._to_copy):
        return operands[0].to(dtype)  # type: ignore[union-attr]
    with torch.autocast("cpu", enabled=False):
        return node.target(*operands).to(dtype)  # type: ignore[no-any-return]


def _is_written(node: fx.Node) -> bool:
    """Whether an operator writes to `node` in place, or to a view of it."""
    return any(node in written_nodes(u) or (node in aliased_inputs(u) and _is_written(u)) for u in node.users)


_FILLED_WITH: dict[Any, Any] = {
    aten.full: "last",
    aten.scalar_tensor: "last",
    aten.full_like: "last",
    aten.new_full: "last",
    aten.zeros: 0,
    aten.new_zeros: 0,
    aten.zeros_like: 0,
    aten.ones: 1,
    aten.new_ones: 1,
    aten.ones_like: 1,
}


def _literal(node: fx.Node) -> torch.Tensor | None:
    if not str(node.target).startswith("_tensor_constant"):
        return None
    tensor = operator.attrgetter(str(node.target))(node.graph.owning_module)
    if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1 or tensor.device.type != "cpu":
        return None
    return tensor.detach().reshape(())
