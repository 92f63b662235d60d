"""Which values are about the same tokens.

Dimension atoms say how a value is laid out, not what it is about: an encoder's and a decoder's hidden states of equal length
that are both added to one table of positions have the same atoms, and yet their tokens are not the same, and one being padded
says nothing of the other. Two values are of one *stream* where data flows between them row by row. What is the same for every
batch (positions, parameters) connects nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from varlen_inductor import _compat

from .demand import mixes_tokens
from .domain import Domain, layout_of
from .oprules import Typing, is_tensor
from .site import attention_of


class Streams:
    """The streams of a graph.

    Args:
        graph: with canonical attentions.
        table: the dimension typing of its nodes.
    """

    def __init__(self, graph: fx.Graph, table: Mapping[fx.Node, Typing]) -> None:
        self._graph = graph
        self._table = table
        self._data = _values_of_data(graph, table)
        self._of: dict[Domain, frozenset[fx.Node]] = {}
        self._sites: dict[Domain, int] = {}

    def of(self, domain: Domain) -> frozenset[fx.Node]:
        """The values of the streams that the attentions of ``domain`` take their keys and values from."""
        if self._sites.get(domain) != len(domain.sites):
            self._sites[domain] = len(domain.sites)
            self._of[domain] = self._connected(domain)
        return self._of[domain]

    def _connected(self, domain: Domain) -> frozenset[fx.Node]:
        neighbours: dict[fx.Node, list[fx.Node]] = {}
        carries = {n: self._carries(n, domain) for n in self._graph.nodes}
        for node in self._graph.nodes:
            if not carries[node] or node not in self._data:
                continue
            # The rows of an attention are those of its queries.
            sources = node.args[:1] if attention_of(node) is not None else node.all_input_nodes
            for x in sources:
                if not isinstance(x, fx.Node) or not carries[x] or x not in self._data or x in self._table[node].shape_only:
                    continue
                # The queries are of the attention's stream even where they are its keys too.
                if attention_of(node) is not None or not mixes_tokens(node, x, self._table, domain):
                    neighbours.setdefault(node, []).append(x)
                    neighbours.setdefault(x, []).append(node)
        stack = [x for site in domain.sites for x in site.args[1:3] if isinstance(x, fx.Node)]
        found: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack += neighbours.get(node, ())
        # What is no data but read by this stream alone (an embedding of positions) goes with it.
        for node in reversed(self._graph.nodes):
            if carries[node] and node not in self._data and node.users and all(user in found for user in node.users):
                found.add(node)
        return frozenset(found)

    def _carries(self, node: fx.Node, domain: Domain) -> bool:
        if node.op == "output":
            return False
        if is_tensor(node):
            return layout_of(self._table[node].dims, domain) is not None
        if isinstance(node.meta.get("val"), (list, tuple)):
            return any(d is not None and layout_of(d, domain) is not None for d in self._table[node].dims)
        return False


def _values_of_data(graph: fx.Graph, table: Mapping[fx.Node, Typing]) -> frozenset[fx.Node]:
    """What depends on the inputs of this batch: on more than sizes, parameters and buffers."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            depends = isinstance(node.meta.get("val"), torch.Tensor) and not _compat.is_parameter_or_buffer(node)
        elif node.op == "output":
            depends = False
        else:
            depends = any(x in found and x not in table[node].shape_only for x in node.all_input_nodes)
        if depends:
            found.add(node)
    return frozenset(found)
