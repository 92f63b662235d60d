"""In-place operators become functional where nothing can tell the difference.

    before                                                        after
    %m = aten.zeros.default([8, 8])                               %m = aten.zeros.default([8, 8])
    %s = aten.slice.Tensor(%m, 1, 4, 8)                           %s = aten.slice.Tensor(%m, 1, 4, 8)
    %w = aten.fill_.Scalar(%s, -inf)                              %f = aten.full_like.default(%s, -inf)
    %y = aten.add.Tensor(%x, %m)                                  %m1 = aten.slice_scatter.default(%m, %f, 1, 4, 8)
                                                                  %y = aten.add.Tensor(%x, %m1)

Memory that the graph itself allocates and reaches only through views that can be undone is handled: each write makes a new
version of it, and what reads a view afterwards reads a view of the new version.  All other memory that is written (inputs,
buffers, what a higher-order operator returned) stays as it is; `written_storages` names it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx
from torch._ops import OpOverload

from varlen_inductor import _compat

from .aliasing import Storages, storages_of, written_nodes
from .simplify import drop_identities, drop_unused
from .views import View, view_of
from .writes import Write, write_of

__all__ = ["functionalise", "written_storages"]


def functionalise(gm: fx.GraphModule) -> None:
    """Replace in-place operators on memory that only `gm` sees by functional ones, in place.

    The numbers that the graph computes, and their gradients, are unchanged.  `view` becomes `reshape` where memory is not
    written, so that what stands before it may be replaced by an operator whose result has other strides.

    Args:
        gm: as `normalise` returns it: `meta["val"]` on every node, views of one storage sharing it.
    """
    graph = gm.graph
    storages = Storages(graph, possible=False)
    members: dict[fx.Node, list[fx.Node]] = {}
    written: set[fx.Node] = set()
    for node in graph.nodes:
        members.setdefault(storages.root(node), []).append(node)
        written.update(storages.root(w) for w in written_nodes(node))
    without_grad = _nodes_without_grad(graph)
    autocast = _autocast_possible(graph)
    for root in [n for n in graph.nodes if n in written]:
        memory = _Memory.of(members[root], without_grad, autocast)
        if memory is not None:
            memory.functionalise()
    drop_identities(graph)
    drop_unused(graph)
    _relax_views(graph)
    graph.lint()
    gm.recompile()


def written_storages(graph: fx.Graph) -> frozenset[fx.Node]:
    """Every node whose memory is, or may be, written anywhere in `graph`, through whichever view; inputs included.

    What such a node holds depends on when it is read: it is opaque to the mask prover and a boundary to the packer.
    """
    storages = Storages(graph, possible=True)
    written = {storages.root(w) for node in graph.nodes for w in written_nodes(node)}
    return frozenset(n for n in graph.nodes if storages.root(n) in written)


def _relax_views(graph: fx.Graph) -> None:
    """`view` demands strides of its argument; `reshape` copies if it has to, and where nothing is written that is the same.

    An operator can then be replaced by one whose result has other strides.
    """
    written = written_storages(graph)
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default and node not in written:
            node.target = torch.ops.aten.reshape.default


class _Memory:
    """One storage that the graph allocates: the node that makes it, the views of it, the writes to it."""

    def __init__(self, base: fx.Node, views: dict[fx.Node, View], writes: dict[fx.Node, Write]) -> None:
        self.base = base
        self.views = views
        self.writes = writes
        self.graph = base.graph
        # The node that holds now what a member holds; views that have not been made yet are missing.
        self.current: dict[fx.Node, fx.Node] = {base: base}
        self.emitted: list[fx.Node] = []
        self.written = False

    @staticmethod
    def of(members: list[fx.Node], without_grad: frozenset[fx.Node], autocast: bool) -> _Memory | None:
        """None unless every member and every write is understood."""
        base = members[0]
        if not _allocates(base):
            return None
        views: dict[fx.Node, View] = {}
        writes: dict[fx.Node, Write] = {}
        known = set(members)
        for node in members[1:]:
            if any(w in known for w in written_nodes(node)):
                write = write_of(node, autocast)
                # Without grad mode a write changes the data and leaves their history of gradients as it was.
                if write is None or (node in without_grad and _any_requires_grad(members)):
                    return None
                writes[node] = write
            else:
                view = view_of(node)
                if view is None or view.source not in known:
                    return None
                views[node] = view
        memory = _Memory(base, views, writes)
        users = {u for n in members for u in n.users}
        if any(w in known for u in users if u not in writes for w in written_nodes(u)):
            return None
        return memory if all(memory._can_write(w.target) for w in writes.values()) else None

    def _can_write(self, target: fx.Node) -> bool:
        node = self._owner(target)
        while node is not self.base:
            view = self.views[node]
            if view.undo is None:
                return False
            node = self._owner(view.writes_to)
        return True

    def functionalise(self) -> None:
        """Go through the graph once, from where the memory is made."""
        node = self.base.next
        while node.op != "root":
            following = node.next
            if node in self.writes:
                self._write(node)
            elif node in self.views:
                self.current[node] = self._replayed(node, before=node) if self.written else node
            elif self.written:
                node.args = fx.map_arg(node.args, self._now)
                node.kwargs = fx.map_arg(node.kwargs, self._now)
            node = following
        old = [n for n in self.graph.nodes if n in self.writes or n in self.views]
        emitted = set(self.emitted)
        new = [n for n in self.graph.nodes if n in emitted]
        for unused in (*reversed(new), *reversed(old)):
            if not unused.users:
                self.graph.erase_node(unused)

    def _write(self, node: fx.Node) -> None:
        target = self._owner(self.writes[node].target)
        with self.graph.inserting_before(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._now)
            new = self.writes[node].emit(self.graph, self.current[target], args, kwargs)
            # From the view that was written up to the memory it is part of, then down again to all other views.
            fresh = {target: new}
            while target is not self.base:
                view = self.views[target]
                target = self._owner(view.writes_to)
                new = view.scatter(self.graph, self.current[target], new, node)
                fresh[target] = new
            made = [m for m in self.current if m not in fresh]
            self.current.update(fresh)
            self.written = True
            # Here and not where they are read: a reader may be under another grad mode.
            for member in made:
                self.current[member] = self._replayed(member, before=node)

    def _replayed(self, node: fx.Node, before: fx.Node) -> fx.Node:
        view = self.views[node]
        with self.graph.inserting_before(before):
            replayed = view.replay(self.graph, self._now)
        self.emitted.append(replayed)
        return replayed

    def _owner(self, node: fx.Node) -> fx.Node:
        """The result of an in-place operator is what it wrote to."""
        while node in self.writes:
            node = self.writes[node].target
        return node

    def _now(self, node: fx.Node) -> fx.Node:
        return self.current.get(self._owner(node), node)


def _allocates(node: fx.Node) -> bool:
    """Whether `node` is a new tensor: what an operator returns that writes nothing, or one of several that it returns."""
    maker = node.args[0] if node.target is operator.getitem else node
    if not isinstance(maker, fx.Node) or not isinstance(maker.target, OpOverload) or any(written_nodes(maker)):
        return False
    if not isinstance(node.meta.get("val"), torch.Tensor) or len(own := list(storages_of(node))) != 1:
        return False
    given = {storage for source in maker.all_input_nodes for storage in storages_of(source)}
    return own[0] not in given and list(storages_of(maker)).count(own[0]) == 1


def _nodes_without_grad(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes that run with grad mode off."""
    enabled = torch.is_grad_enabled()
    off = set()
    for node in graph.nodes:
        if node.target is _compat.SET_GRAD_ENABLED:
            enabled = bool(node.args[0])
        elif not enabled:
            off.add(node)
    return frozenset(off)


def _any_requires_grad(nodes: Iterable[fx.Node]) -> bool:
    return any(n.meta.get("requires_grad", True) for n in nodes)


def _autocast_possible(graph: fx.Graph) -> bool:
    enters = _compat.ENTER_AUTOCAST
    devices = {v.device.type for n in graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)}
    on = any(torch.is_autocast_enabled(d) for d in devices if torch.amp.is_autocast_available(d))
    return on or any(n.target is enters for n in graph.nodes)
