"""Batch and heads folded into one dimension, (B * H, S, D): which factor is which.

Only a view knows; it is found by walking back from the folded tensor to where the dimension was made:

    %v = aten.view.default(%x, [s, b * h, d])     # %x is (S, B, E), so b is a whole dimension of %x and h a part of E
    %q = aten.transpose.int(%v, 0, 1)             # (B * H, S, D)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..dims import as_size
from ..nodes import arguments, aten, calls, same_size, shape, tensor
from .candidate import NotAttention

_VIEWS = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten)
_SAME_LAYOUT = (
    aten.contiguous, aten.clone, aten.to, aten._to_copy, aten.mul, aten.div, aten.dropout, aten.alias, aten.add, aten.detach,
)  # fmt: skip


def folded_sizes(node: fx.Node) -> tuple[Any, Any]:
    """(B, H) of a folded (B * H, S, D) tensor; (B * H, 1) where nothing shows how it was folded."""
    total = shape(node)[0]
    batch = _batch_of(node, 0)
    if batch is None:
        return total, 1
    heads = _quotient(total, batch)
    return (total, 1) if heads is None else (batch, heads)


def _quotient(total: Any, part: Any) -> Any | None:
    if isinstance(total, int) and isinstance(part, int):
        return total // part if part > 0 and total % part == 0 else None
    quotient = total // part
    return quotient if same_size(quotient * part, total) else None


def _batch_of(node: fx.Node, dim: int) -> Any | None:
    """The size of the leading factor of dimension `dim`, found where a view folded it."""
    while True:
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, fx.Node) or tensor(source) is None:
            return None
        if calls(node, *_SAME_LAYOUT):
            if len(shape(source)) != len(shape(node)) or not same_size(shape(source)[dim], shape(node)[dim]):
                return None
        elif calls(node, aten.transpose):
            given = arguments(node)
            rank = len(shape(node))
            swapped = {given["dim0"] % rank: given["dim1"] % rank, given["dim1"] % rank: given["dim0"] % rank}
            dim = swapped.get(dim, dim)
        elif calls(node, aten.permute):
            dim = arguments(node)["dims"][dim] % len(shape(node))
        elif calls(node, *_VIEWS):
            return _leading_factor(shape(source), shape(node), dim)
        else:
            return None
        node = source


def _leading_factor(source: tuple[Any, ...], target: tuple[Any, ...], dim: int) -> Any | None:
    """`target[dim]`, a view of `source`, begins with a whole dimension of `source`: its size."""
    before: Any = 1
    for size in target[:dim]:
        before = before * size
    passed: Any = 1
    for size in source:
        if same_size(passed, before) and not same_size(size, 1):
            return None if same_size(size, target[dim]) or not _divides(size, target[dim]) else size
        passed = passed * size
    return None


def _divides(part: Any, total: Any) -> bool:
    numerator: Any = as_size(total)
    ratio = numerator / as_size(part)
    return bool(ratio.is_integer) or (not ratio.is_number and ratio.as_numer_denom()[1] == 1)


def check_batch(query: fx.Node, key: fx.Node, value: fx.Node, kv_groups: int) -> None:
    """Query, key and value must agree in batch and heads: SDPA and matmul would broadcast, a varlen kernel does not.

    Raises:
        NotAttention: they do not.
    """
    for name, node in (("key", key), ("value", value)):
        for size, other, groups in zip(shape(query)[:-2], shape(node)[:-2], (1, kv_groups), strict=False):
            if not same_size(size, other * groups):
                raise NotAttention(
                    f"the {name}'s batch and heads {list(shape(node)[:-2])} broadcast to the query's {list(shape(query)[:-2])}"
                )
