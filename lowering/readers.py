"""Who reads a tensor of a graph after autograd: whether it may have steps between its rows, and whether it leaves the graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

import torch
from torch import fx
from torch.utils import _pytree as pytree

from varlen_inductor.patterns.nodes import aten, calls

_ops = torch.ops.varlen_inductor
_ANY_STRIDES = (aten.mm, aten.addmm, aten.bmm, aten.sum, aten.cat, _ops.varlen_attn, _ops.varlen_attn_drawn)


def take_any_strides(readers: Iterable[fx.Node], results: bool = False) -> bool:
    """Whether these nodes, and those that read views which they make, ask for no strides, as kernels of the user's may do.

    Without ``results`` the output of the graph is none of them.
    """
    return all(_takes_any_strides(node) or (results and node.op == "output") for node in _past_views(readers))


def ways_out(node: fx.Node) -> frozenset[int]:
    """The places among the graph's results at which ``node`` or a view of it stands."""
    views = {node, *_views_of(node)}
    (results,) = node.graph.output_node().args
    return frozenset(place for place, result in enumerate(pytree.tree_leaves(results)) if result in views)


def _takes_any_strides(node: fx.Node) -> bool:
    return calls(node, *_ANY_STRIDES) or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _past_views(readers: Iterable[fx.Node]) -> Iterator[fx.Node]:
    left = list(readers)
    while left:
        node = left.pop()
        if _passes_on(node):
            left.extend(node.users)
        else:
            yield node


def _views_of(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if _passes_on(user):
            yield user
            yield from _views_of(user)


def _passes_on(node: fx.Node) -> bool:
    return node.target is operator.getitem or (_is_view(node) and not calls(node, aten.as_strided))


def _is_view(node: fx.Node) -> bool:
    """Whether the result may share the memory of an operand, by the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)
