"""Find every attention in a normalised graph, whatever its spelling.

A spelling is a module with `ANCHORS`, the operators at which it begins to look, and `match(node, facts)`, which walks from
there and returns a `Candidate`, returns None if the node has nothing to do with attention, or raises `NotAttention(reason)`.
To add one, write the module and put it into `SPELLINGS`.
"""

from __future__ import annotations

from torch import fx

from varlen_inductor import _compat

from ..functionalise import written_storages
from ..nodes import live_nodes
from . import decomposed, left_alone, sdpa
from .candidate import Candidate, Facts, NotAttention, Rejected

__all__ = ["Candidate", "Rejected", "find_candidates"]

SPELLINGS = (sdpa, decomposed, left_alone)


def find_candidates(gm: fx.GraphModule) -> tuple[list[Candidate], list[Rejected]]:
    """All attentions of `gm`, and all that looked like one, both in graph order.

    The graph computes the same afterwards; unused view nodes may have been added to it, where a candidate needs the key in
    a layout that the graph has no node for.

    Args:
        gm: as `normalise` returns it.
    """
    candidates: list[Candidate] = []
    rejected: list[Rejected] = []
    facts = Facts(live_nodes(gm.graph), written_storages(gm.graph))
    for spelling in SPELLINGS:
        for node in _compat.find_anchors(gm, spelling.ANCHORS):
            try:
                candidate = spelling.match(node, facts)
            except NotAttention as reason:
                rejected.append(Rejected(node, reason.reason))
                continue
            if candidate is not None:
                candidates.append(candidate)
    position = {n: i for i, n in enumerate(gm.graph.nodes)}
    candidates.sort(key=lambda c: position[c.output])
    rejected.sort(key=lambda r: position[r.node])
    return candidates, rejected
