"""Gradients of query, key and value that one projection made, written where its gradient wants them.

Where a model projects to query, key and value at once, its backward puts their three gradients side by side in one tensor: a copy
of all of them (26.8 us beside 135 us for the attention's backward: a profile of benchmarks/model.py's B 32, S 512 on one H100, by a
script that is not kept). Kernels that write to rows with any step between them write them there right away.

    before                                                        after
    %g = varlen_attn_backward(...)                                %j = varlen_attn_backward_joined(...)    # (T, 3 * H * D)
    %c = cat([%g[0], %g[1], %g[2]], 1)    # (T, 3 * H, D)         %c = reshape(%j, [-1, 3 * H, D])
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from varlen_inductor import _compat_inductor
from varlen_inductor.lowering.readers import take_any_strides
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
    for cat in list(graph.find_nodes(op="call_function", target=aten.cat.default)):
        attention = _attention_of(cat)
        if attention is not None and may_be_columns(attention) and writes_in_place(attention):
            _join_into(attention, cat)
            joined += 1
    return joined


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


def may_be_columns(attention: fx.Node) -> bool:
    """Whether the gradients may have steps between their rows, and share their memory: nothing leaves the graph, where whoever got
    two results of one memory might change one of them in place, and nothing that reads them asks for strides."""
    return take_any_strides(attention.users)


def _operands(attention: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of the backward operator, fake tensors for nodes."""
    args, kwargs = fx.map_arg((attention.args, dict(attention.kwargs)), lambda n: n.meta["val"])
    return list(args), dict(kwargs)


def writes_in_place(attention: fx.Node) -> bool:
    """Whether the kernel that runs the backward can write to rows that are there."""
    args, kwargs = _operands(attention)
    _, grad_lse, _, _, _, query, key, value, *rest = args
    if grad_lse is not None or not same_size(query.shape[0], key.shape[0]):
        return False
    layout, rule, kernels = split_arguments(query, *rest, **kwargs)
    problem = Problem.of(query, key, value, layout, rule)
    return choose(problem, kernels or default_kernels(), backward=True).backend.backward_into is not None


def matrices(attention: fx.Node) -> list[fx.Node] | None:
    """The gradients of query, key and value as matrices of (T, H * D), if that is all they are used as."""
    found: dict[Any, fx.Node] = {}
    for gradient in attention.users:
        at = gradient
        while at.meta["val"].dim() != 2 and len(at.users) == 1 and calls(next(iter(at.users)), *_VIEWS):
            at = next(iter(at.users))
        x, rows = at.meta["val"], gradient.meta["val"]
        if x.dim() != 2 or x.dtype != rows.dtype or not same_size(x.shape[0], rows.shape[0]):
            return None
        found[gradient.args[1]] = at
    return [found[place] for place in range(3)] if sorted(found) == [0, 1, 2] else None


def widths_of(attention: fx.Node) -> list[int]:
    """How many numbers a row of query's, key's and value's gradient has."""
    return [x.shape[1] * x.shape[2] for x in _operands(attention)[0][5:8]]


def join(attention: fx.Node) -> fx.Node:
    """Replace the backward by the joined one, its gradients by columns of that. Returns it."""
    args, kwargs = _operands(attention)
    widths = widths_of(attention)
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
    joined = join(attention)
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
