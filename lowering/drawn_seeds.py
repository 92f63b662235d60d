"""The seeds of dropout inside of attention, read where Inductor has drawn all seeds of the graph at once.

An attention is given two numbers side by side (`attention`). Inductor draws all numbers of a graph with one kernel, and hands those
that its own kernels do not read on by another: one more for every attention. The two lie side by side to begin with, and an
attention can be told where (``seeds_at``). So all of them keep one tensor for their backwards, not each its own two numbers.

    before                                                 after
    %s = inductor_seeds(24, cuda)                          %s = inductor_seeds(24, cuda)
    %a = inductor_lookup_seed(%s, 4)
    %b = inductor_lookup_seed(%s, 5)
    %two = cat([unsqueeze(%a, 0), unsqueeze(%b, 0)])
    %o = varlen_attn_drawn(..., seeds=%two)                %o = varlen_attn_drawn(..., seeds_at=4, seeds=%s)
    %g = varlen_attn_backward(..., %two, ...)              %g = varlen_attn_backward(..., %s, ..., seeds_at=4)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from varlen_inductor import _compat_inductor
from varlen_inductor.patterns.nodes import arguments, aten, call_like, calls

_ops = torch.ops.varlen_inductor
_PLACES: dict[Any, str] = {
    _ops.varlen_attn.default: "seeds",
    _ops.varlen_attn_drawn.default: "seeds",
    _ops.varlen_attn_backward.default: "rng_state",
    _ops.varlen_attn_backward_joined.default: "rng_state",
}


def keep_seeds(graph: fx.Graph) -> int:
    """Where AOTAutograd may draw numbers again, see to it that it does not; in how many places."""
    if not _compat_inductor.may_compute_random_numbers_again():
        return 0
    drawn = graph.find_nodes(op="call_function", target=_compat_inductor.draws_seeds())
    for node in drawn:
        _compat_inductor.keep(node)
    return len(drawn)


def read_seeds_in_place(graph: fx.Graph) -> int:
    """Rewrite ``graph`` in place, one whose nodes have fake tensors; the number of pairs that were found."""
    found = 0
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        drawn = _pair(node)
        if drawn is None:
            continue
        seeds, first = drawn
        for user in list(node.users):
            if _reads(user, node):
                user.replace_input_with(node, seeds)
                user.kwargs = {**user.kwargs, "seeds_at": first}
        if node.users:
            with graph.inserting_before(node):
                node.replace_all_uses_with(call_like(node, aten.slice.Tensor, seeds, 0, first, first + 2))
        graph.erase_node(node)  # what it was made of is dead code
        found += 1
    return found


def _reads(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` is an attention whose seeds are ``node``, and which has no other use for it."""
    place = _PLACES.get(user.target)
    return place is not None and [name for name, value in arguments(user).items() if value is node] == [place]


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
