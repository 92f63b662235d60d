"""Build the packed graph: every node of a region as its twin, everything else as it was, pack and unpack only at the edges.

The source graph is read, never changed. Each of its values exists in the new graph in up to two forms: *padded*, as in the
source, and *packed*, once per domain. A form that a value does not have yet is made at its definition, so that it is made
once and under the grad mode of its producer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import fx

from . import recompute
from .dims import Size, as_size
from .domain import Domain
from .oprules import LOSSES_OF_TOKENS, Args, Typing, op_name
from .outputs import Outputs
from .packed_view import Crossing, PackedView, Plan, Region
from .site import attention_of
from .twins import NotPackable, emit_twin

__all__ = ["Builder", "Crossing", "EmitSite", "PackedView", "Plan", "Region", "twin_kind"]

aten = torch.ops.aten

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
        elif op_name(node) in LOSSES_OF_TOKENS and self._reads_unknown_rows(node):
            self._padded[node] = self._loss(node, self.views[self.region_of[node.args[0]].domain])  # type: ignore[index]
        else:
            self._copy(node)

    def _reads_unknown_rows(self, node: fx.Node) -> bool:
        """Whether the rows of the first operand are reduced, are packed, and nobody knows padded ones. (Known ones may count.)"""
        source = node.args[0]
        region = self.region_of.get(source)  # type: ignore[arg-type]
        reduced = Args(node, self.table)["reduction"] != 0
        return reduced and region is not None and not region.pad_values.known(source)  # type: ignore[arg-type]

    def _loss(self, node: fx.Node, view: PackedView) -> fx.Node:
        """Cross entropy over packed rows; dead rows are ignored by their label.

        Sound where the analysis found (and the plan checks) that all padded rows are ignored, so that a mean has the same
        denominator.
        """
        given = Args(node, self.table)
        alive = view.helper("alive", view.alive)
        labels = self.call(aten.where.ScalarOther, alive, view.packed(given["target"]), given["ignore_index"])
        rest = [self.padded(x) if isinstance(x, fx.Node) else x for x in (given[n] for n in given.names[2:])]
        return self.call(node.target, view.packed(given["self"]), labels, *rest)

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


def twin_kind(node: fx.Node) -> str:
    """For reports: the operator of a node."""
    attention = attention_of(node)
    return "attention" if attention is not None else op_name(node)
