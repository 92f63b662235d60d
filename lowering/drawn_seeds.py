"""The seeds of dropout inside of attention, read where Inductor has drawn all seeds of the graph at once.

An attention is given two numbers side by side (`attention`). Inductor draws all numbers of a graph with one kernel, and hands those
that its own kernels do not read on by another: one more for every attention. The two lie side by side to begin with.

    before                                             after
    %s = inductor_seeds(24, cuda)                      %s = inductor_seeds(24, cuda)
    %a = inductor_lookup_seed(%s, 4)                   %two = slice(%s, 0, 4, 6)
    %b = inductor_lookup_seed(%s, 5)
    %two = cat([unsqueeze(%a, 0), unsqueeze(%b, 0)])
"""

from __future__ import annotations

from typing import Any

from torch import fx

from varlen_inductor import _compat_inductor
from varlen_inductor.patterns.nodes import arguments, aten, call_like, calls


def read_seeds_in_place(graph: fx.Graph) -> int:
    """Rewrite ``graph`` in place, a graph after autograd whose nodes have fake tensors; the number of pairs that were found."""
    found = 0
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        drawn = _pair(node)
        if drawn is None:
            continue
        seeds, first = drawn
        with graph.inserting_before(node):
            two = call_like(node, aten.slice.Tensor, seeds, 0, first, first + 2)
        node.replace_all_uses_with(two)
        graph.erase_node(node)  # what it was made of is dead code
        found += 1
    return found


def _pair(node: fx.Node) -> tuple[fx.Node, int] | None:
    """All seeds, and the place of the first of the two that ``node`` puts side by side."""
    parts: Any = arguments(node)["tensors"]
    places = [_place(part) for part in parts] if len(parts) == 2 else []
    if len(places) != 2 or places[0] is None or places[1] is None:
        return None
    (seeds, first), (others, second) = places[0], places[1]
    return (seeds, first) if others is seeds and second == first + 1 else None


def _place(part: Any) -> tuple[fx.Node, int] | None:
    if not calls(part, aten.unsqueeze):
        return None
    one = part.args[0]
    lookup = _compat_inductor.seed_lookup()
    return (one.args[0], one.args[1]) if one.op == "call_function" and one.target is lookup else None
