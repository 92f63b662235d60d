"""The typing of a whole graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..dims import DimConflict, fresh_dims
from . import linear_algebra, losses, one_dimension, pointwise, views  # noqa: F401 (their rules)
from .attention import SITE_NAME, attention_site
from .core import RULES, Args, Mixed, Typing, is_tensor, op_name


def type_node(node: fx.Node, table: Mapping[fx.Node, Typing]) -> Typing:
    """The typing of ``node``, given those of its inputs in ``table``."""
    if node.op in ("placeholder", "get_attr"):
        return Typing(_fresh_like(node))
    if node.op == "call_function" and node.target is operator.getitem:
        return _getitem(node, table)
    name = op_name(node)
    try:
        if name in RULES and (isinstance(node.target, torch._ops.OpOverload)):
            return RULES[name](Args(node, table))
        if name == SITE_NAME:
            return attention_site(node, table)
    except (DimConflict, IndexError, KeyError, TypeError):
        pass
    return Typing(_fresh_like(node), mixed=_everything(node, table), opaque=True)


def _fresh_like(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return fresh_dims(value.shape, node.name)
    if isinstance(value, (list, tuple)):
        return tuple(fresh_dims(v.shape, node.name) if isinstance(v, torch.Tensor) else None for v in value)
    return ()


def _everything(node: fx.Node, table: Mapping[fx.Node, Typing]) -> Mixed:
    return tuple((x, i) for x in node.all_input_nodes if is_tensor(x) for i in range(len(table[x].dims)))


def _getitem(node: fx.Node, table: Mapping[fx.Node, Typing]) -> Typing:
    source, index = node.args
    assert isinstance(source, fx.Node)
    typing = table.get(source)
    if not is_tensor(node):
        return Typing(())
    if typing is None or not isinstance(index, int) or typing.dims[index] is None:
        return Typing(_fresh_like(node), opaque=True)
    return Typing(typing.dims[index], opaque=typing.opaque)


def infer(graph: fx.Graph) -> dict[fx.Node, Typing]:
    """Type every node of a graph whose nodes carry fake values in ``meta["val"]``."""
    table: dict[fx.Node, Typing] = {}
    for node in graph.nodes:
        if node.op != "output":
            table[node] = type_node(node, table)
    return table
