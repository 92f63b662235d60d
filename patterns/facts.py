"""Facts about the data that a packed graph relies on, and the graph that finds them out before it runs.

The *plan graph* takes the same inputs as the model's graph and returns the mask of valid positions of each domain, then one
flag for each fact. It runs first; if a flag is false the padded graph runs instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .demand import Read, ancestors_of
from .dims import as_size
from .domain import Domain
from .oprules import Args, Typing, is_tensor
from .regions import Choice
from .site import attention_of

aten = torch.ops.aten
_MOST_NODES = 200


@dataclass(frozen=True)
class Fact:
    """``text`` for the user; ``emit(graph, mask_of)`` adds its 0-d bool to the source graph, given the masks of the domains."""

    text: str
    emit: Callable[[fx.Graph, dict[Domain, fx.Node]], fx.Node]


class FactNotCheckable(Exception):
    """A fact that would take the model itself to find out."""

    def __init__(self, reason: str, nodes: Sequence[fx.Node] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.nodes = nodes


def windowed(site: fx.Node) -> bool:
    """Whether a site's mask depends on distances, beyond plain causality."""
    attention = attention_of(site)
    assert attention is not None
    return (attention.proof.window_left, attention.proof.window_right) not in ((-1, -1), (-1, 0))


def facts_of(choice: Choice, table: dict[fx.Node, Typing]) -> list[Fact]:
    """Everything that the choice of regions takes for granted about the data.

    Raises:
        FactNotCheckable: for one that the plan cannot find out.
    """
    facts: dict[str, Fact] = {}
    for site in choice.domains:
        for fact in facts_of_site(choice, site, windows_by_rank=True):
            facts.setdefault(fact.text, fact)
    for region in choice.regions:
        analysis = choice.analyses[region.domain]
        reads = {read for node in region.nodes if not region.pad_values.known(node) for read in analysis.of(node).reads}
        for read in sorted(reads, key=lambda r: (r.node.name, r.position)):
            fact = _harmless(read, region.domain, table)
            facts.setdefault(fact.text, fact)
    return list(facts.values())


def facts_of_site(choice: Choice, site: fx.Node, *, windows_by_rank: bool) -> list[Fact]:
    """What rewriting one attention takes for granted.

    ``windows_by_rank``: a window is measured between ranks of valid positions, not between the positions (rule 8).
    """
    attention, domain = attention_of(site), choice.domains[site]
    assert attention is not None
    facts = [Fact(o.text, lambda graph, masks, o=o: o.emit(graph)) for o in attention.proof.obligations]  # type: ignore[misc]
    own = next((r for r in choice.regions if site in r.nodes), None)
    same_domain = own is not None and own.domain is domain
    if windows_by_rank and same_domain and windowed(site) and not domain.predicate.is_prefix:
        facts.append(_contiguous(domain))
    if not same_domain and attention.proof.no_valid_key != "zero":
        facts.append(_never_empty(domain))
    return facts


def _call(graph: fx.Graph, target: Callable[..., object], *args: object, **kwargs: object) -> fx.Node:
    return graph.call_function(target, args, kwargs)  # type: ignore[arg-type]


def _contiguous(domain: Domain) -> Fact:
    def emit(graph: fx.Graph, masks: dict[Domain, fx.Node]) -> fx.Node:
        mask = masks[domain]
        starts = _call(graph, aten.diff.default, _call(graph, aten.to.dtype, mask, torch.int8))
        rising = _call(graph, aten.sum.dim_IntList, _call(graph, aten.gt.Scalar, starts, 0), [1])
        first = _call(graph, aten.select.int, mask, 1, 0)
        return _call(graph, aten.all.default, _call(graph, aten.le.Scalar, _call(graph, aten.add.Tensor, rising, first), 1))

    return Fact(f"the valid positions of each sequence are contiguous ({domain.predicate.text})", emit)


def _never_empty(domain: Domain) -> Fact:
    def emit(graph: fx.Graph, masks: dict[Domain, fx.Node]) -> fx.Node:
        return _call(graph, aten.all.default, _call(graph, aten.any.dim, masks[domain], 1))

    return Fact(f"every sequence has a valid position ({domain.predicate.text})", emit)


def _harmless(read: Read, domain: Domain, table: dict[fx.Node, Typing]) -> Fact:
    text = domain.predicate.text
    if read.kind == "position":

        def emit_position(graph: fx.Graph, masks: dict[Domain, fx.Node]) -> fx.Node:
            return _call(graph, aten.all.default, _call(graph, aten.select.int, masks[domain], 1, read.position))

        return Fact(f"position {read.position} of every sequence is valid ({text})", emit_position)
    if read.kind == "index":
        indices = read.node.args[1]
        assert isinstance(indices, (list, tuple))
        _check_cheap([x for x in indices if isinstance(x, fx.Node)], read)

        def emit_index(graph: fx.Graph, masks: dict[Domain, fx.Node]) -> fx.Node:
            return _call(graph, aten.all.default, _call(graph, aten.index.Tensor, masks[domain], list(indices)))

        return Fact(f"the position that {read.node.name} reads in every sequence is valid ({text})", emit_index)
    a = Args(read.node, table)
    target, ignore = a["target"], a["ignore_index"]
    _check_cheap([target], read)

    def emit_loss(graph: fx.Graph, masks: dict[Domain, fx.Node]) -> fx.Node:
        ignored = _call(graph, aten.eq.Scalar, target, ignore)
        valid = _call(graph, aten.reshape.default, masks[domain], [-1])
        return _call(graph, aten.all.default, _call(graph, aten.logical_or.default, ignored, valid))

    return Fact(f"the labels of {read.node.name} are {ignore} at padded positions ({text})", emit_loss)


def _check_cheap(nodes: Sequence[fx.Node], read: Read) -> None:
    """A fact is checked before the model runs, so it may depend on inputs but not on what the model computes."""
    for node in ancestors_of(*nodes):
        parameter = is_tensor(node) and (node.meta["val"].requires_grad or node.meta.get("requires_grad"))
        if parameter or node.op == "get_attr":
            raise FactNotCheckable(f"{read.node.name} reads rows that only the model itself can tell", (read.node,))
    if len(ancestors_of(*nodes)) > _MOST_NODES:
        raise FactNotCheckable(f"{read.node.name} reads rows whose choice takes many operations", (read.node,))


def plan_graph(gm: fx.GraphModule, domains: Sequence[Domain], facts: Sequence[Fact]) -> fx.GraphModule:
    """The plan graph; see the module's docstring. Adds nodes to ``gm``, before its output."""
    graph = gm.graph
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        masks = {domain: emit_mask(graph, domain) for domain in domains}
        wanted = [*masks.values(), *(fact.emit(graph, masks) for fact in facts)]
    return _extract(gm, wanted)


def emit_mask(graph: fx.Graph, domain: Domain) -> fx.Node:
    """The (B, S) bool of a domain's valid positions, at the graph's insertion point."""
    return domain.predicate.emit(graph, *mask_sizes(domain))


def mask_sizes(domain: Domain) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """The sizes of a domain's mask: ints where they are static."""
    attention = attention_of(domain.sites[0])
    assert attention is not None
    length = domain.sites[0].args[1].meta["val"].shape[-2]  # type: ignore[union-attr]
    assert as_size(length) == domain.length
    return attention.batch, length


def _extract(gm: fx.GraphModule, wanted: Sequence[fx.Node]) -> fx.GraphModule:
    needed = ancestors_of(*wanted)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in wanted))
    graph.lint()
    return fx.GraphModule(gm, graph)
