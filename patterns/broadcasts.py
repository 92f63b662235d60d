"""What broadcasts several tensors at once, written as one `expand` for each.

    before                                                   after
    %l = aten.broadcast_tensors.default([%x, %y])            %a = aten.expand.default(%x, [8, 4])
    %a = getitem(%l, 0)
    %t = aten.take_along_dim.default(%x, %i, 1)              %e = aten.expand.default(%i, [8, 1])
                                                             %t = aten.gather.default(%x, 1, %e)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from . import recompute
from .dims import as_size
from .emit import emit
from .nodes import arguments, aten, calls, same_size, shape

Size = int | torch.SymInt


def expand_apart(graph: fx.Graph) -> None:
    """Rewrite the operators of the module's docstring, in place. Identities among the expands are left."""
    for node in list(graph.nodes):
        if calls(node, aten.broadcast_tensors):
            _expand_each(graph, node)
        elif calls(node, aten.take_along_dim) and arguments(node)["dim"] is not None:
            _gather(graph, node)


def _expand_each(graph: fx.Graph, node: fx.Node) -> None:
    tensors = arguments(node)["tensors"]
    for result in [user for user in node.users if user.target is operator.getitem]:
        new = _expanded(graph, node, tensors[result.args[1]], tensors, shape(result))
        result.replace_all_uses_with(new)
        graph.erase_node(result)
    if not node.users:
        graph.erase_node(node)


def _gather(graph: fx.Graph, node: fx.Node) -> None:
    given = arguments(node)
    source, index = given["self"], given["indices"]
    dim = given["dim"] % len(shape(node))
    taken = _expanded(graph, node, index, (source, index), shape(node))
    along = [*shape(node)[:dim], shape(source)[dim], *shape(node)[dim + 1 :]]
    source = _expanded(graph, node, source, (source, index), along)
    with graph.inserting_before(node):
        new = emit(graph, node, aten.gather.default, source, dim, taken)
    recompute.mark_like([new], node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _expanded(graph: fx.Graph, like: fx.Node, x: fx.Node, tensors: Sequence[fx.Node], wanted: Sequence[Size]) -> fx.Node:
    """``x`` in the shape ``wanted``, the sizes of which are among those of ``tensors``; on behalf of ``like``, and before it."""
    with graph.inserting_before(like):
        sizes = [_size(graph, like, size, tensors) for size in wanted]
        new = emit(graph, like, aten.expand.default, x, sizes)
    recompute.mark_like([new, *(n for n in sizes if isinstance(n, fx.Node))], like)
    return new


def _size(graph: fx.Graph, like: fx.Node, size: Size, tensors: Sequence[fx.Node]) -> int | fx.Node:
    if as_size(size).is_Integer:
        return int(size)
    found = next((x, dim) for x in tensors for dim, n in enumerate(shape(x)) if same_size(n, size))
    return emit(graph, like, aten.sym_size.int, *found)
