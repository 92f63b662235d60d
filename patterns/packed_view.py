"""One domain's packed forms in a graph under construction: what is packed, what is unpacked, and how operands line up.

A value with one row per token has a *packed* form ``(T, *rest)`` besides its padded one. `PackedView` makes either from the other,
at most once each, and gives the handlers of twins (`patterns.twins`) their operands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .dims import Size, leaves, size_of
from .domain import Domain, Layout, layout_of, partial_layout
from .oprules import is_tensor
from .padvalue import PadValues
from .twins import NotPackable, rest_sizes

if TYPE_CHECKING:
    from .builder import Builder

aten = torch.ops.aten


@dataclass(frozen=True)
class Plan:
    """The nodes of the new graph that say where a domain's tokens are; see `varlen_inductor.ops.packing`.

    ``dead_sequence``: ``cu_seqlens`` has one more sequence, made of the dead rows. ``used``: the keys in use of each sequence,
    in a plan that moves no rows.
    """

    index: fx.Node
    inverse: fx.Node
    cu_seqlens: fx.Node
    dead_sequence: bool
    used: fx.Node | None = None


@dataclass(frozen=True)
class Crossing:
    """A pack or an unpack: the value of ``node`` that crossed the edge of a region, the node that made it necessary, and what
    was emitted for it."""

    kind: str
    node: fx.Node
    user: fx.Node
    emitted: fx.Node


@dataclass
class Region:
    """The nodes that run packed in one domain, in graph order, and what crossed its edges."""

    domain: Domain
    nodes: set[fx.Node]
    pad_values: PadValues
    crossings: list[Crossing] = field(default_factory=list)
    refused: dict[fx.Node, str] = field(default_factory=dict)


class PackedView:
    """One domain's packed forms in the new graph."""

    def __init__(self, builder: Builder, region: Region) -> None:
        self.builder = builder
        self.region = region
        self.domain = region.domain
        self.table = builder.table
        self.twins: dict[fx.Node, fx.Node] = {}
        self.plan: Plan | None = None
        self._packs: dict[fx.Node, fx.Node] = {}
        self._partials: dict[fx.Node, fx.Node] = {}
        self._unpacks: dict[tuple[fx.Node, Any, bool], fx.Node] = {}
        self._helpers: dict[str, fx.Node] = {}

    # What handlers of twins use.
    @property
    def own(self) -> set[fx.Node]:
        return self.builder.own

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.builder.call(target, *args, **kwargs)

    def size(self, size: Size) -> Any:
        return self.builder.size(size)

    def plain(self, node: fx.Node) -> fx.Node:
        return self.builder.padded(node)

    def layout(self, node: fx.Node) -> Layout | None:
        return layout_of(self.table[node].dims, self.domain) if is_tensor(node) else None

    def touches(self, node: fx.Node) -> bool:
        return is_tensor(node) and not self.free_of_tokens(node)

    def carries(self, node: fx.Node) -> bool:
        """Whether ``node``, or one of its results, has token rows."""
        if is_tensor(node):
            return self.layout(node) is not None
        return any(d is not None and layout_of(d, self.domain) is not None for d in self.table[node].dims)

    def free_of_tokens(self, node: fx.Node) -> bool:
        """Whether ``node`` varies with neither position nor batch row of the domain, not even in part."""
        tokens = {*self.domain.batch, *self.domain.position}
        return all(tokens.isdisjoint(leaves(dim)) for dim in self.table[node].dims)

    def shape(self, node: fx.Node) -> list[Any]:
        """The shape argument of the twin of ``node``."""
        return [-1, *rest_sizes(self, node)]

    def ready(self) -> Plan:
        if self.plan is None:
            raise NotPackable("the mask is computed after this value")
        return self.plan

    def helper(self, name: str, make: Callable[[], fx.Node]) -> fx.Node:
        """A node that depends on the plan alone, made once, right behind it."""
        if name not in self._helpers:
            plan = self.ready()
            with self.builder.after(plan.index, plan.inverse, plan.cu_seqlens, *self._helpers.values()):
                self._helpers[name] = make()
        return self._helpers[name]

    def position_index(self) -> fx.Node:
        """The position in its sequence of each packed row, (T,) int64."""
        return self.helper("position", lambda: self.call(aten.remainder.Scalar, self.ready().index, self.size(self.domain.length)))

    def batch_index(self) -> fx.Node:
        """The batch row of each packed row, (T,) int64."""
        length = self.size(self.domain.length)
        return self.helper("batch", lambda: self.call(aten.div.Tensor_mode, self.ready().index, length, rounding_mode="floor"))

    def alive(self) -> fx.Node:
        """Which packed rows are tokens and not dead, (T,) bool."""
        plan = self.ready()
        row = self.call(aten.index.Tensor, plan.inverse, [plan.index])
        # Not a cumsum of ones: Triton takes tens of seconds to compile a scan.
        rows = self.call(aten.sym_size.int, plan.index, 0)
        number = self.call(aten.arange.default, rows, device=self.domain.sites[0].meta["val"].device)
        return self.call(aten.eq.Tensor, row, number)

    def packed(self, node: fx.Node) -> fx.Node:
        """The packed form of a value with token rows."""
        if node in self.twins:
            return self.twins[node]
        if node in self._packs:
            return self._packs[node]
        made = self._pack(node)
        if self.builder.lasting:
            self._packs[node] = made
        return made

    def _pack(self, node: fx.Node) -> fx.Node:
        plan, layout = self.ready(), self.layout(node)
        if layout is None:
            raise NotPackable(f"{node.name} has no token rows")
        padded = self.builder.padded(node)
        with self.builder.after(padded, plan.index, plan.inverse, here=node in self.builder.boundaries):
            rows = self.to_rows(padded, layout)
            if plan.used is not None:
                return rows
            return self._crossed("pack", node, self.call(torch.ops.varlen_inductor.pack.default, rows, plan.index, plan.inverse))

    def _crossed(self, kind: str, node: fx.Node, emitted: fx.Node) -> fx.Node:
        user = self.builder._current
        assert user is not None
        self.region.crossings.append(Crossing(kind, node, user, emitted))
        return emitted

    def _run_sizes(self, layout: Layout) -> list[Any]:
        return [self.size(size_of(atoms)) for _, atoms in layout.order]

    def _rows_order(self, layout: Layout) -> list[int]:
        """Runs in the order batch, position, rest."""
        kinds = [kind for kind, _ in layout.order]
        return [i for wanted in "bs" for i, k in enumerate(kinds) if k == wanted] + [i for i, k in enumerate(kinds) if k == "r"]

    def _positions(self) -> Any:
        return self.size(self.domain.batch_size * self.domain.length)

    def to_rows(self, padded: fx.Node, layout: Layout) -> fx.Node:
        """(B * S, *rest) from any layout."""
        order = self._rows_order(layout)
        split = padded
        if any(n != 1 for n in layout.runs_per_dim):
            split = self.call(aten.reshape.default, split, self._run_sizes(layout))
        if order != sorted(order):
            split = self.call(aten.permute.default, split, order)
        rest = [self.size(size_of(atoms)) for atoms in layout.rest]
        return self.call(aten.reshape.default, split, [self._positions(), *rest])

    def from_rows(self, rows: fx.Node, node: fx.Node) -> fx.Node:
        """The layout of ``node`` from (B * S, *rest)."""
        layout = self.layout(node)
        assert layout is not None
        order = self._rows_order(layout)
        sizes = self._run_sizes(layout)
        value = self.call(aten.reshape.default, rows, [sizes[i] for i in order])
        back = sorted(range(len(order)), key=order.__getitem__)
        if back != sorted(back):
            value = self.call(aten.permute.default, value, back)
        if any(n != 1 for n in layout.runs_per_dim):
            value = self.call(aten.reshape.default, value, [self.size(n) for n in node.meta["val"].shape])
        return value

    def unpacked(self, node: fx.Node, fill: Any, *, repeat: bool) -> fx.Node:
        """The padded form of a packed value, its padded rows filled with ``fill`` or with copies of a valid row."""
        key = (node, None if repeat else float(fill), repeat)
        if key not in self._unpacks:
            plan, twin = self.ready(), self.twins[node]
            with self.builder.after(twin, plan.index, plan.inverse):
                rows = self.call(
                    torch.ops.varlen_inductor.unpack.default, twin, plan.index, plan.inverse, 0.0 if repeat else float(fill), repeat
                )
                self._crossed("unpack", node, rows)
                self._unpacks[key] = self.from_rows(rows, node)
        return self._unpacks[key]

    def valid_like(self, node: fx.Node) -> fx.Node:
        """Which rows of ``node`` are valid, as a bool that broadcasts against its padded form."""
        layout = self.layout(node)
        assert layout is not None
        if any(n != 1 for n in layout.runs_per_dim):
            raise NotPackable("its tokens share a dimension with something else")
        shape = [self.size(size_of(atoms)) if kind != "r" else 1 for kind, atoms in layout.order]
        order = [i for i in self._rows_order(layout) if layout.order[i][0] != "r"]
        valid = self.call(aten.ge.Scalar, self.ready().inverse, 0)
        valid = self.call(aten.reshape.default, valid, [shape[i] for i in order])
        if order != sorted(order):
            valid = self.call(aten.permute.default, valid, [1, 0])
        return self.call(aten.reshape.default, valid, shape)

    def zeroed(self, node: fx.Node, padded: fx.Node) -> fx.Node:
        """``padded``, the padded form of ``node``, with zeros in its padded rows."""
        layout = self.layout(node)
        assert layout is not None
        zero = False if node.meta["val"].dtype is torch.bool else 0  # an integer would make an integer of it
        if any(n != 1 for n in layout.runs_per_dim):
            rows = self.to_rows(padded, layout)
            valid = self.call(aten.ge.Scalar, self.ready().inverse, 0)
            valid = self.call(aten.reshape.default, valid, [-1] + [1] * len(layout.rest))
            return self.from_rows(self.call(aten.where.ScalarOther, valid, rows, zero), node)
        return self.call(aten.where.ScalarOther, self.valid_like(node), padded, zero)

    def operand(self, x: fx.Node, node: fx.Node) -> fx.Node:
        """``x`` as an operand of the twin of the pointwise ``node``: aligned with ``(T, *rest)`` by broadcasting."""
        layout = self.layout(node)
        if layout is None:
            raise NotPackable("its result has no token rows")
        offset = len(layout.runs_per_dim) - x.meta["val"].dim()
        has_rest = [layout.packed_dim(i) is not None for i in range(len(layout.runs_per_dim))]
        if self.layout(x) is not None:
            packed = self.packed(x)
            missing = sum(has_rest[:offset])
            for _ in range(missing):
                packed = self.call(aten.unsqueeze.default, packed, 1)
            return packed
        partial = partial_layout(self.table[x].dims, self.domain)
        if partial is None:
            if not self.free_of_tokens(x):
                raise NotPackable(f"{x.name} holds its tokens in a way that has no packed form")
            return self._without_token_dims(self.builder.padded(x), x, has_rest, offset)
        gathered = self._partials.get(x)
        if gathered is None:
            gathered = self._gather(x, *partial)
            if self.builder.lasting:
                self._partials[x] = gathered
        other = [i for i in range(x.meta["val"].dim()) if i != partial[1]]
        drop = [1 + j for j, i in enumerate(other) if not has_rest[i + offset]]
        if drop:
            gathered = self.call(aten.squeeze.dims, gathered, drop)
        for _ in range(sum(has_rest[:offset])):
            gathered = self.call(aten.unsqueeze.default, gathered, 1)
        return gathered

    def _gather(self, x: fx.Node, kind: str, dim: int) -> fx.Node:
        """A value that varies with only the position (or the batch), for each packed row: (T, *others)."""
        index = self.position_index() if kind == "s" else self.batch_index()
        padded = self.builder.padded(x)
        with self.builder.after(padded, index, here=x in self.builder.boundaries):
            moved = padded if dim == 0 else self.call(aten.movedim.int, padded, dim, 0)
            return self._crossed("pack", x, self.call(aten.index_select.default, moved, 0, index))

    def _without_token_dims(self, value: fx.Node, x: fx.Node, has_rest: list[bool], offset: int) -> fx.Node:
        drop = [i for i in range(x.meta["val"].dim()) if i + offset >= 0 and not has_rest[i + offset]]
        return self.call(aten.squeeze.dims, value, drop) if drop else value
