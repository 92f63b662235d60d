"""Gradients of query, key and value side by side in one tensor, written there by the kernel.

Where a model projects to query, key and value at once, its backward puts their three gradients side by side in one tensor: a copy
of all of them (26.8 us beside 135 us for the attention's backward: a profile of benchmarks/model.py's B 32, S 512 on one H100, by a
script that is not kept). Kernels that write to rows with any step between them write them there right away.

    before                                                        after
    %g = varlen_attn_backward(...)                                %j = varlen_attn_backward_joined(...)    # (T, 3 * H * D)
    %c = cat([%g[0], %g[1], %g[2]], 1)    # (T, 3 * H, D)         %c = reshape(%j, [-1, 3 * H, D])

Where it has three projections with biases, each of the three gradients is summed over its rows, which is one kernel each that runs
for 4 us and takes the host longer to launch (a profile of Hugging Face's BERT in benchmarks/model.py on a H200; as above). Side by
side they are summed by one.

    %g = varlen_attn_backward(...)                                %j = varlen_attn_backward_joined(...)
    %q, %k, %v = sum(%g[0], [0]), ...     # (H * D,) each         %s = sum(%j, [0])                        # (3 * H * D,)
                                                                  %q, %k, %v = %s[:H * D], ...
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from varlen_inductor import _compat_inductor
from varlen_inductor.ops.attention import default_kernels, split_arguments
from varlen_inductor.ops.backends import choose
from varlen_inductor.ops.problem import Problem
from varlen_inductor.patterns.nodes import arguments, aten, call_like, calls, same_size, tensor

_ops = torch.ops.varlen_inductor
_VIEWS = (aten.reshape, aten.view, aten.unsqueeze, aten.squeeze)


def join_gradients(graph: fx.Graph) -> int:
    """Rewrite ``graph`` in place, a graph after autograd whose nodes have fake tensors; how many attentions were joined."""
    if _compat_inductor.compiles_ahead_of_time():
        return 0
    joined = 0
    # Those first: side by side they save more.
    for cat in list(graph.find_nodes(op="call_function", target=aten.cat.default)):
        attention = _attention_of(cat)
        if attention is not None and _may_be_columns(attention) and _writes_in_place(attention):
            _join_into(attention, cat)
            joined += 1
    return joined


def join_summed_gradients(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Rewrite ``graph`` in place as `join_gradients` does, where all three gradients are summed; how many attentions that were."""
    if _compat_inductor.compiles_ahead_of_time():
        return 0
    joined = 0
    for attention in list(graph.find_nodes(op="call_function", target=_ops.varlen_attn_backward.default)):
        query = tensor(attention.args[5])
        if query is None or query.device.type != device_type:
            continue
        sums = _row_sums_of(attention)
        if sums is not None and _may_be_columns(attention) and _writes_in_place(attention):
            _join_sums(attention, sums)
            joined += 1
    return joined


def _row_sums_of(attention: fx.Node) -> list[fx.Node] | None:
    """The sums over the rows of query's, key's and value's gradient, if each has one and all are of one dtype."""
    found: dict[int, fx.Node] = {}
    for gradient in attention.users:
        if gradient.target is not operator.getitem:
            return None
        place: Any = gradient.args[1]
        for node in (gradient, *(user for user in gradient.users if calls(user, *_VIEWS))):
            for user in node.users:
                if _sums_rows(user, gradient):
                    found[place] = user
    if sorted(found) != [0, 1, 2] or len({node.meta["val"].dtype for node in found.values()}) != 1:
        return None
    return [found[place] for place in range(3)]


def _sums_rows(node: fx.Node, gradient: fx.Node) -> bool:
    """Whether ``node`` is the sum over the rows of ``gradient`` (T, ...), of which it reads a view."""
    if node.target is not aten.sum.dim_IntList:
        return False
    given = arguments(node)
    rows = tensor(given["self"])
    if rows is None or not same_size(rows.shape[0], gradient.meta["val"].shape[0]):
        return False
    return [d % rows.dim() for d in given["dim"] or ()] == [0]


def _attention_of(cat: fx.Node) -> fx.Node | None:
    """The attention whose three gradients ``cat`` puts side by side in each row; None if it does something else."""
    given = arguments(cat)
    pieces, dim, joined = given["tensors"], given["dim"] % cat.meta["val"].dim(), cat.meta["val"]
    if len(pieces) != 3 or dim == 0 or any(n != 1 for n in joined.shape[1:dim]):
        return None
    attention: fx.Node | None = None
    for place, piece in enumerate(pieces):
        at: Any = piece
        x = tensor(piece)
        while calls(at, *_VIEWS):
            at = at.args[0]
        if x is None or not isinstance(at, fx.Node) or at.target is not operator.getitem or at.args[1] != place:
            return None
        found: Any = at.args[0]
        if not calls(found, _ops.varlen_attn_backward) or attention not in (None, found):
            return None
        attention = found
        if not x.dtype == joined.dtype == at.meta["val"].dtype or not same_size(x.shape[0], at.meta["val"].shape[0]):
            return None
    return attention


def _may_be_columns(attention: fx.Node) -> bool:
    """Whether the gradients may have steps between their rows, and share their memory: nothing leaves the graph, where whoever got
    two results of one memory might change one of them in place, and what reads them asks for no strides, as kernels of the user's
    may do."""
    readers = list(attention.users)
    while readers:
        node = readers.pop()
        if node.target is operator.getitem or (_is_view(node) and not calls(node, aten.as_strided)):
            readers.extend(node.users)
        elif not (calls(node, *_ANY_STRIDES) or torch.Tag.pointwise in getattr(node.target, "tags", ())):
            return False
    return True


_ANY_STRIDES = (aten.mm, aten.addmm, aten.bmm, aten.sum, aten.cat)


def _is_view(node: fx.Node) -> bool:
    """Whether the result may share the memory of an operand, by the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _operands(attention: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of the backward operator, fake tensors for nodes."""
    args, kwargs = fx.map_arg((attention.args, dict(attention.kwargs)), lambda n: n.meta["val"])
    return list(args), dict(kwargs)


def _writes_in_place(attention: fx.Node) -> bool:
    """Whether the kernel that runs the backward can write to rows that are there."""
    args, kwargs = _operands(attention)
    _, grad_lse, _, _, _, query, key, value, *rest = args
    if grad_lse is not None or not same_size(query.shape[0], key.shape[0]):
        return False
    layout, rule, kernels = split_arguments(query, *rest, **kwargs)
    problem = Problem.of(query, key, value, layout, rule)
    return choose(problem, kernels or default_kernels(), backward=True).backend.backward_into is not None


def _widths(attention: fx.Node) -> list[int]:
    """How many numbers a row of query's, key's and value's gradient has."""
    return [x.shape[1] * x.shape[2] for x in _operands(attention)[0][5:8]]


def _join(attention: fx.Node) -> fx.Node:
    """Replace the backward by the joined one, its gradients by columns of that. Returns it."""
    args, kwargs = _operands(attention)
    widths = _widths(attention)
    graph = attention.graph
    with graph.inserting_before(attention):
        joined = graph.call_function(_ops.varlen_attn_backward_joined.default, attention.args, attention.kwargs)
        joined.meta = {**attention.meta, "val": _ops.varlen_attn_backward_joined.default(*args, **kwargs)}
        for piece in list(attention.users):
            place: Any = piece.args[1]
            start = sum(widths[:place])
            columns = call_like(piece, aten.slice.Tensor, joined, 1, start, start + widths[place])
            rows = call_like(piece, aten.view.default, columns, [-1, *piece.meta["val"].shape[1:]])
            piece.replace_all_uses_with(rows)
            graph.erase_node(piece)
    graph.erase_node(attention)
    return joined


def _join_into(attention: fx.Node, cat: fx.Node) -> None:
    joined = _join(attention)
    graph = cat.graph
    with graph.inserting_before(cat):
        whole = call_like(cat, aten.view.default, joined, [-1, *cat.meta["val"].shape[1:]])
    cat.replace_all_uses_with(whole)
    pieces: list[Any] = list(arguments(cat)["tensors"])
    graph.erase_node(cat)
    for at in pieces:
        while not at.users and calls(at, *_VIEWS, aten.slice):
            above: Any = at.args[0]
            graph.erase_node(at)
            at = above


def _join_sums(attention: fx.Node, sums: list[fx.Node]) -> None:
    """Join the gradients, and replace their sums by slices of the sum of all."""
    widths, dtype = _widths(attention), sums[0].meta["val"].dtype
    joined = _join(attention)
    graph = joined.graph
    with graph.inserting_after(joined):
        total = call_like(sums[0], aten.sum.dim_IntList, joined, [0], dtype=dtype)
    for place, node in enumerate(sums):
        start = sum(widths[:place])
        with graph.inserting_before(node):
            own = call_like(node, aten.slice.Tensor, total, 0, start, start + widths[place])
            own = call_like(node, aten.view.default, own, list(node.meta["val"].shape))
        node.replace_all_uses_with(own)
        graph.erase_node(node)
