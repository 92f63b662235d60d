"""Which nodes an attention consists of, and whether anybody else looks at them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from .candidate import Facts, NotAttention


def interior_of(core: Sequence[fx.Node], side: Sequence[fx.Node], facts: Facts) -> tuple[fx.Node, ...]:
    """The nodes that nothing needs once the last node of `core` is replaced, in graph order.

    Args:
        core: the nodes from scores to output; the output is the last.
        side: nodes on the way of query, key and value to them, which belong to the attention if nothing else reads them.

    Raises:
        NotAttention: a node of `core` is read from outside, or its memory is written.
    """
    output = core[-1]
    inside = set(core)
    for node in core:
        if node in facts.written:
            raise NotAttention(f"{node} is written in place")
        outside = [u for u in node.users if u in facts.live and u not in inside]
        if node is not output and outside:
            what = "weights" if _after_softmax(node, core) else "scores"
            raise NotAttention(f"its {what} are also used by {outside[0]}: they are returned, or kept (output_attentions)")
    order = {n: i for i, n in enumerate(output.graph.nodes)}
    for node in sorted(set(side) - inside, key=order.__getitem__, reverse=True):
        if all(u in inside for u in node.users if u in facts.live):
            inside.add(node)
    return tuple(sorted(inside, key=order.__getitem__))


def _after_softmax(node: fx.Node, core: Sequence[fx.Node]) -> bool:
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    softmax = next((n for n in core if "softmax" in str(n.target)), node)
    return order[node] >= order[softmax]
