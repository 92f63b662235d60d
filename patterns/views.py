"""Views that can be made again from a new version of their source, and undone to write a new version back into it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from .emit import emit, shape_arguments
from .nodes import arguments

aten = torch.ops.aten

Scatter = Callable[[fx.Graph, fx.Node, fx.Node, fx.Node, fx.Node], fx.Node]


@dataclass(frozen=True, eq=False)
class View:
    """`node` is a view of `source`.

    `undo(graph, node, parent, new, like)` returns `parent`, a version of `writes_to`, with the elements that `node` shows
    replaced by `new`; None for a view through which nothing can be written.  `writes_to` is `source`, except for a piece of
    what was split, which is written into what was split.
    """

    node: fx.Node
    source: fx.Node
    undo: Scatter | None
    writes_to: fx.Node

    def replay(self, graph: fx.Graph, now: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """The same view of the version of its source that there is `now`."""
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), now)
        return emit(graph, self.node, self.node.target, *args, **kwargs)  # type: ignore[arg-type]

    def scatter(self, graph: fx.Graph, parent: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
        """`parent`, a version of `writes_to`, after `new` was written through this view."""
        assert self.undo is not None
        return self.undo(graph, self.node, parent, new, like)


def view_of(node: fx.Node) -> View | None:
    """What `node` is a view of, None if it is no view that can be made again."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.target is operator.getitem:
        whole = view_of(source)
        if whole is None or not isinstance(node.args[1], int):
            return None
        return View(node, source, _undo_piece, whole.source)
    if not isinstance(node.target, OpOverload):
        return None
    packet = node.target.overloadpacket
    if packet in _READ_ONLY:
        return View(node, source, None, source)
    undo = _UNDO.get(packet)
    return None if undo is None else View(node, source, undo, source)


def _undo_slice(graph: fx.Graph, view: fx.Node, parent: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
    given = arguments(view)
    return emit(graph, like, aten.slice_scatter.default, parent, new, given["dim"], given["start"], given["end"], given["step"])


def _undo_select(graph: fx.Graph, view: fx.Node, parent: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
    given = arguments(view)
    return emit(graph, like, aten.select_scatter.default, parent, new, given["dim"], given["index"])


def _undo_transpose(graph: fx.Graph, view: fx.Node, parent: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
    _, first, second = arguments(view).values()
    return emit(graph, like, aten.transpose.int, new, first, second)


def _undo_t(graph: fx.Graph, view: fx.Node, parent: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
    return emit(graph, like, aten.t.default, new)


def _undo_mt(graph: fx.Graph, view: fx.Node, parent: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
    return emit(graph, like, aten.transpose.int, new, -2, -1)


def _undo_permute(graph: fx.Graph, view: fx.Node, parent: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
    dims: Sequence[int] = arguments(view)["dims"]
    inverse = [0] * len(dims)
    for place, dim in enumerate(dims):
        inverse[dim % len(dims)] = place
    return emit(graph, like, aten.permute.default, new, inverse)


def _undo_unsqueeze(graph: fx.Graph, view: fx.Node, parent: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
    return emit(graph, like, aten.squeeze.dim, new, arguments(view)["dim"])


def _undo_reshape(graph: fx.Graph, view: fx.Node, parent: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
    return emit(graph, like, aten.reshape.default, new, shape_arguments(graph, parent))


def _undo_identity(graph: fx.Graph, view: fx.Node, parent: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
    return new


def _undo_piece(graph: fx.Graph, view: fx.Node, parent: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
    """`view` is one piece of what `unbind`, `split` or `chunk` made of `parent`."""
    pieces, index = view.args
    assert isinstance(pieces, fx.Node)
    assert isinstance(index, int)
    given = arguments(pieces)
    dim = given["dim"]
    if pieces.target.overloadpacket is aten.unbind:  # type: ignore[union-attr]
        return emit(graph, like, aten.select_scatter.default, parent, new, dim, index)
    start = sum(piece.shape[dim] for piece in pieces.meta["val"][:index])
    return emit(graph, like, aten.slice_scatter.default, parent, new, dim, start, start + new.meta["val"].shape[dim])


# `unbind` and its like are written through their pieces.
_READ_ONLY = frozenset(
    {
        aten.expand,
        aten.expand_as,
        aten.diagonal,
        aten.unfold,
        aten.narrow,
        aten.movedim,
        aten.unbind,
        aten.split,
        aten.split_with_sizes,
        aten.chunk,
        aten.tensor_split,
    }
)
_UNDO: dict[Any, Scatter] = {
    aten.slice: _undo_slice,
    aten.select: _undo_select,
    aten.transpose: _undo_transpose,
    aten.swapaxes: _undo_transpose,
    aten.swapdims: _undo_transpose,
    aten.t: _undo_t,
    aten.mT: _undo_mt,
    aten.permute: _undo_permute,
    aten.unsqueeze: _undo_unsqueeze,
    aten.squeeze: _undo_reshape,
    aten.view: _undo_reshape,
    aten.reshape: _undo_reshape,
    aten.view_as: _undo_reshape,
    aten.reshape_as: _undo_reshape,
    aten.flatten: _undo_reshape,
    aten.unflatten: _undo_reshape,
    aten.alias: _undo_identity,
    aten.contiguous: _undo_identity,
    aten.to: _undo_identity,
    aten.dropout: _undo_identity,
    aten.type_as: _undo_identity,
    aten.lift_fresh: _undo_identity,
}
