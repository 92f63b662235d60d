"""What a packed graph returns: the outputs of the source, as eager would hand them out.

Padded rows that nobody computed are zero; strides and the sharing of memory between outputs are those of the source.
"""

from __future__ import annotations

from functools import cmp_to_key
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from varlen_inductor import config, report

from .aliasing import Storages
from .dims import as_size, quotient
from .domain import Domain
from .oprules import is_tensor

if TYPE_CHECKING:
    from .builder import Builder, PackedView

aten = torch.ops.aten


class Outputs:
    """Maps each returned value of the source to the node of the new graph that is returned in its place.

    Under ``config.debug`` the backward of an output raises if it is given a gradient for rows that were not computed.

    Args:
        builder: with everything but the output emitted.
        output: the output node of the source.
    """

    def __init__(self, builder: Builder, output: fx.Node) -> None:
        self._builder = builder
        self._storages = Storages(builder.source.graph, possible=False)
        self._made: dict[fx.Node, fx.Node] = {}
        self._index = {node: i for i, node in reversed(list(enumerate(output.all_input_nodes)))}
        self._returned: dict[fx.Node, set[fx.Node]] = {}
        for node in output.all_input_nodes:
            self._returned.setdefault(self._storages.root(node), set()).add(node)
        self._given = {self._storages.root(n) for n in builder.source.graph.nodes if n.op in ("placeholder", "get_attr")}

    def __call__(self, node: fx.Node) -> fx.Node:
        root = self._storages.root(node)
        if len(self._returned[root]) > 1 or root in self._given:
            return self._as_view(node, root)
        return self._alone(node)

    def _as_view(self, node: fx.Node, root: fx.Node) -> fx.Node:
        """A value that shares memory with other outputs, or with an input: the same views of the same memory."""
        if node in self._made:
            return self._made[node]
        builder = self._builder
        viewed = {x: self._as_view(x, root) for x in node.all_input_nodes if self._storages.root(x) is root}
        changed = node in builder.region_of or node in builder.tainted
        if (
            node.op != "call_function"
            or not viewed
            or not (changed or any(not builder.is_padded(x, new) for x, new in viewed.items()))
        ):
            # Also what was written in place: to emit it once more would write once more.
            return self._alone(node)
        new = builder.graph.node_copy(node, lambda x: viewed[x] if x in viewed else builder.padded(x))
        new.meta = dict(node.meta)
        self._made[node] = new
        return new

    def _alone(self, node: fx.Node) -> fx.Node:
        if node not in self._made:
            self._made[node] = self._emit(node)
        return self._made[node]

    def _emit(self, node: fx.Node) -> fx.Node:
        builder = self._builder
        region = builder.region_of.get(node)
        if region is not None and is_tensor(node):
            view, fill = builder.views[region.domain], region.pad_values.value(node)
            value = self._with_strides(view.unpacked(node, fill or 0, repeat=False), node)
            return value if fill is not None else self._watched(value, node, view)
        value = builder.padded(node)
        for domain in self._tainted(node):
            view = builder.views[domain]
            value = self._watched(view.zeroed(node, value), node, view)
        return value

    def _tainted(self, node: fx.Node) -> list[Domain]:
        domains = self._builder.tainted.get(node, set()) if is_tensor(node) else set()
        return [d for d in sorted(domains, key=lambda d: d.index) if self._builder.views[d].layout(node) is not None]

    def _watched(self, value: fx.Node, node: fx.Node, view: PackedView) -> fx.Node:
        if not config.debug or not node.meta["val"].is_floating_point():
            return value
        layout = view.layout(node)
        assert layout is not None
        name = f"output {self._index.get(node, 0)} ({report.source_of(node)})"
        rows = view.to_rows(value, layout)
        watched = self._builder.call(torch.ops.varlen_inductor.watch_padded_rows.default, rows, view.ready().inverse, name)
        return view.from_rows(watched, node)

    def _with_strides(self, value: fx.Node, node: fx.Node) -> fx.Node:
        """The dimensions of an unpacked value in the order in memory that eager's has."""
        order = _order_in_memory(node.meta["val"])
        if order is None:
            return value
        call = self._builder.call
        if order != sorted(order):
            value = call(aten.permute.default, value, order)
        value = call(aten.contiguous.default, value)
        return (
            call(aten.permute.default, value, sorted(range(len(order)), key=order.__getitem__)) if order != sorted(order) else value
        )


def _order_in_memory(value: torch.Tensor) -> list[int] | None:
    """The dimensions from the slowest to the fastest, None if that cannot be told. (Sizes of one have any stride.)"""
    strides: list[Any] = [as_size(s) for s in value.stride()]
    unclear = False

    def compare(i: int, j: int) -> int:
        nonlocal unclear
        if as_size(value.shape[i]) == 1 or as_size(value.shape[j]) == 1 or strides[i] == strides[j]:
            return i - j
        if strides[j] != 0 and quotient(strides[i], strides[j]) is not None:
            return -1
        if strides[i] != 0 and quotient(strides[j], strides[i]) is not None:
            return 1
        unclear = True
        return i - j

    order = sorted(range(value.dim()), key=cmp_to_key(compare))
    return None if unclear else order
