"""Build the packed graph: every node of a region as its twin, everything else as it was, pack and unpack only at the edges.

The source graph is read, never changed. Each of its values exists in the new graph in up to two forms: *padded*, as in the
source, and *packed*, once per domain. A form that a value does not have yet is made at its definition, so that it is made
once and under the grad mode of its producer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from . import recompute
from .dims import Size, as_size, leaves, size_of
from .domain import Domain, Layout, layout_of, partial_layout
from .oprules import Typing, is_tensor, op_name
from .outputs import Outputs
from .padvalue import PadValues
from .site import attention_of
from .twins import NotPackable, emit_twin, rest_sizes

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


EmitSite = Callable[["Builder", fx.Node], fx.Node]


class Builder:
    """Emits the new graph.

    Args:
        source: the module to rewrite, with canonical attentions.
        table: dimension typing of its nodes.
        regions: what to pack; a node is in at most one.
        emit_site: emits a canonical attention; returns the packed twin for one inside a region, else the padded value.
        live: the nodes to emit.
        boundaries: values whose storage is written somewhere: what they hold depends on when they are read.
    """

    def __init__(
        self,
        source: fx.GraphModule,
        table: Mapping[fx.Node, Typing],
        regions: list[Region],
        emit_site: EmitSite,
        live: frozenset[fx.Node],
        boundaries: frozenset[fx.Node] = frozenset(),
    ) -> None:
        self.source = source
        self.table = table
        self.regions = regions
        self.emit_site = emit_site
        self.live = live
        self.boundaries = boundaries
        self.graph = fx.Graph()
        self.own: set[fx.Node] = set()
        self.views = {region.domain: PackedView(self, region) for region in regions}
        self.region_of = {node: region for region in regions for node in region.nodes}
        self.tainted: dict[fx.Node, set[Domain]] = {}
        self.lasting = True
        self._without_grad: set[fx.Node] = set()
        self._grad_enabled = True
        self._padded: dict[fx.Node, fx.Node] = {}
        self._symbols: dict[sympy.Expr, fx.Node] = {}
        self._current: fx.Node | None = None
        self._last_input: fx.Node | None = None
        self._pending: list[tuple[Domain, Callable[[Builder], Plan], set[fx.Node]]] = []

    # --- the walk ----------------------------------------------------------------------------------------------------------

    def plan_in_graph(self, domain: Domain, make: Callable[[Builder], Plan], leaves: set[fx.Node]) -> None:
        """Make the plan of ``domain`` inside the graph, as soon as ``leaves`` have been emitted."""
        self._pending.append((domain, make, set(leaves)))

    def add_input(self, name: str) -> fx.Node:
        """A placeholder after those of the source."""
        node = self.graph.placeholder(name)
        self.own.add(node)
        self._last_input = node
        return node

    def placeholders(self) -> None:
        """Copy the placeholders of the source, in order."""
        for node in self.source.graph.nodes:
            if node.op == "placeholder":
                self._copy(node)
                self._last_input = self._padded[node]

    def build(self) -> fx.GraphModule:
        """Emit all nodes; call `placeholders` (and `add_input`) first."""
        self._make_ready_plans()
        for node in self.source.graph.nodes:
            if node.op == "placeholder":
                continue
            self._current = node
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], Outputs(self, node)))
                break
            if node in self.live:
                last = next(iter(reversed(self.graph.nodes)))
                self._emit(node)
                self._mark_recomputed(node, last)
                self._make_ready_plans()
        self.graph.eliminate_dead_code()
        self.graph.lint()
        alive = set(self.graph.nodes)
        for region in self.regions:
            region.crossings = [c for c in region.crossings if c.emitted in alive]
        return fx.GraphModule(self.source, self.graph)

    def _mark_recomputed(self, node: fx.Node, last: fx.Node) -> None:
        """What was emitted behind ``last`` for a node that is computed again in the backward is too."""
        group = recompute.group_of(node)
        while group is not None and last.next.op != "root":
            last = last.next
            recompute.mark([last], group)

    def _make_ready_plans(self) -> None:
        for entry in list(self._pending):
            domain, make, wanted = entry
            if all(x in self._padded for x in wanted):
                self._pending.remove(entry)
                self.views[domain].plan = make(self)

    def _emit(self, node: fx.Node) -> None:
        region = self.region_of.get(node)
        if region is not None and self._emit_packed(node, region):
            return
        if attention_of(node) is not None:
            self._padded[node] = self.emit_site(self, node)
            self._taint(node)
        elif op_name(node) == "cross_entropy_loss" and self._reads_unknown_rows(node):
            self._padded[node] = self._loss(node, self.views[self.region_of[node.args[0]].domain])  # type: ignore[index]
        else:
            self._copy(node)

    def _reads_unknown_rows(self, node: fx.Node) -> bool:
        """Whether the first operand is packed and nobody knows its padded rows. (Known ones may count in a loss.)"""
        source = node.args[0]
        region = self.region_of.get(source)  # type: ignore[arg-type]
        return region is not None and not region.pad_values.known(source)  # type: ignore[arg-type]

    def _loss(self, node: fx.Node, view: PackedView) -> fx.Node:
        """Cross entropy over packed rows; dead rows are ignored by their label.

        Sound where the analysis found (and the plan checks) that all padded rows are ignored, so that a mean has the same
        denominator.
        """
        names = ("self", "target", "weight", "reduction", "ignore_index", "label_smoothing")
        given: dict[str, Any] = {"weight": None, "reduction": 1, "ignore_index": -100, "label_smoothing": 0.0}
        given.update(zip(names, node.args), **node.kwargs)
        target = view.packed(given["target"])
        alive = view.helper("alive", view.alive)
        labels = self.call(aten.where.ScalarOther, alive, target, given["ignore_index"])
        rest = [self.padded(x) if isinstance(x, fx.Node) else x for x in (given[n] for n in names[2:])]
        return self.call(aten.cross_entropy_loss.default, view.packed(given["self"]), labels, *rest)

    def _emit_packed(self, node: fx.Node, region: Region) -> bool:
        view = self.views[region.domain]
        try:
            twin = self.emit_site(self, node) if attention_of(node) is not None else emit_twin(view, node)
        except NotPackable as error:
            region.refused[node] = str(error)
            del self.region_of[node]
            region.nodes.discard(node)
            return False
        if twin.op == "call_function" and "stack_trace" not in twin.meta:
            twin.meta.update({k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")})
        view.twins[node] = twin
        return True

    def _copy(self, node: fx.Node) -> None:
        new = self.graph.node_copy(node, self.padded)
        new.meta = dict(node.meta)
        if node.target is torch._C._set_grad_enabled:
            self._grad_enabled = bool(node.args[0])
        self._made(new)
        self._padded[node] = new
        self._taint(node)

    def _taint(self, node: fx.Node) -> None:
        """Note in which domains padded rows of ``node`` were computed from rows that only stand in for padded ones.

        Rows of an attention are those of its queries: padded keys are skipped whatever they hold. Where it is known what
        padded rows hold, that is what they were given. What has no rows of tokens was proven not to depend on padded ones.
        """
        domains: set[Domain] = set()
        for x in node.args[:1] if attention_of(node) is not None else node.all_input_nodes:
            region = self.region_of.get(x)  # type: ignore[arg-type]
            if region is not None and not region.pad_values.known(x):  # type: ignore[arg-type]
                domains.add(region.domain)
            domains |= self.tainted.get(x, set())  # type: ignore[arg-type]
        domains = {d for d in domains if self.views[d].carries(node) and not self.views[d].region.pad_values.known(node)}
        if domains:
            self.tainted[node] = domains

    def _made(self, new: fx.Node) -> None:
        self.own.add(new)
        if not self._grad_enabled:
            self._without_grad.add(new)

    # --- the two forms of a value ------------------------------------------------------------------------------------------

    def padded(self, node: fx.Node) -> fx.Node:
        """The padded form of a source value."""
        if node not in self._padded:
            region = self.region_of[node]
            fill = region.pad_values.value(node)
            self._padded[node] = self.views[region.domain].unpacked(node, fill, repeat=fill is None)
        return self._padded[node]

    def is_padded(self, node: fx.Node, new: fx.Node) -> bool:
        """Whether ``new`` is the padded form of ``node``, if it has one yet."""
        return self._padded.get(node) is new

    # --- emitting ----------------------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        if self._current is not None and "stack_trace" in self._current.meta:
            node.meta["stack_trace"] = self._current.meta["stack_trace"]
        self._made(node)
        return node

    @contextmanager
    def after(self, *nodes: fx.Node, here: bool = False) -> Iterator[None]:
        """Insert right behind the last of ``nodes`` (behind all inputs, if it is one), under the grad mode of the first one.

        If there is no such place, or with ``here``, insert where the graph ends now; then ``lasting`` is false until the next
        call: what was inserted is for the current reader alone.
        """
        last = max(nodes)
        if last.op == "placeholder":
            assert self._last_input is not None
            last = self._last_input
        while last.op != "root" and nodes[0] not in self._without_grad and last in self._without_grad:
            last = last.next
        lasting = not here and last.op != "root"
        enabled = self._grad_enabled
        try:
            if lasting:
                self._grad_enabled = last not in self._without_grad
                with self.graph.inserting_before(last.next):
                    yield
            else:
                yield
        finally:
            self._grad_enabled, self.lasting = enabled, lasting

    def size(self, size: Size | int | torch.SymInt) -> Any:
        """A size as an argument: an int, or the node of the new graph that holds it."""
        expression = as_size(size)
        if expression.is_Integer:
            return int(expression)
        if expression not in self._symbols:
            made = self._symbols[expression] = self._make_size(expression)
            # What is inserted behind the inputs later on may use it.
            assert self._last_input is not None
            self._last_input = max(self._last_input, made)
        return self._symbols[expression]

    def _make_size(self, expression: sympy.Expr) -> fx.Node:
        assert self._last_input is not None
        for node in self.source.graph.nodes:
            if node.op != "placeholder":
                break
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == expression:
                return self._padded[node]
        for node in self.source.graph.nodes:
            value = node.meta.get("val")
            if node.op != "placeholder" or not isinstance(value, torch.Tensor):
                continue
            for i, n in enumerate(value.shape):
                if isinstance(n, torch.SymInt) and n.node.expr == expression:
                    with self.after(self._padded[node]):
                        return self.call(aten.sym_size.int, self._padded[node], i)
        power = isinstance(expression, sympy.Pow) and expression.exp.is_Integer and expression.exp > 0
        if power or isinstance(expression, (sympy.Mul, sympy.Add)):
            function = operator.add if isinstance(expression, sympy.Add) else operator.mul
            parts = [self.size(part) for part in ([expression.base] * int(expression.exp) if power else expression.args)]
            made = parts[0]
            for part in parts[1:]:
                with self.after(*[p for p in (made, part) if isinstance(p, fx.Node)]):
                    made = self.call(function, made, part)
            return made
        raise NotPackable(f"the size {expression} cannot be computed from the graph's inputs")


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
        return is_tensor(node) and self.layout(node) is not None or any(
            d is not None and layout_of(d, self.domain) is not None for d in self.table[node].dims if not is_tensor(node)
        )

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


def twin_kind(node: fx.Node) -> str:
    """For reports: the operator of a node."""
    attention = attention_of(node)
    return "attention" if attention is not None else op_name(node)
