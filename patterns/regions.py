"""Choose what to pack: the padding domains of a graph, and for each the region of nodes that run on its valid tokens only."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from .builder import Region
from .demand import NOTHING, Analysis, Demand, analyse, mixes_tokens
from .dims import Atom, Dims, as_size, leaves, size_of
from .domain import Domain, layout_of
from .maskvalue import MaskValues
from .oprules import Typing, is_tensor
from .padvalue import PadValues
from .site import attention_of, attention_site
from .streams import Streams
from .twins import has_twin

Mode = Literal["model", "attention"]


@dataclass
class Choice:
    """What was chosen for one graph.

    Attributes:
        domains: the domain of each site, by site.
        regions: one for each domain, possibly with no nodes.
        analyses: the demand analysis of each domain.
        refused: sites whose operands do not carry the tokens of their mask, with the reason.
    """

    domains: dict[fx.Node, Domain] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)
    analyses: dict[Domain, Analysis] = field(default_factory=dict)
    refused: dict[fx.Node, str] = field(default_factory=dict)

    @property
    def assumptions(self) -> list[str]:
        """What is presumed about values that the model computes."""
        return [text for region in self.regions for text in region.pad_values.assumptions]

    def region(self, domain: Domain) -> Region:
        return next(r for r in self.regions if r.domain is domain)


def choose(
    graph: fx.Graph,
    table: Mapping[fx.Node, Typing],
    live: frozenset[fx.Node],
    *,
    mode: Mode,
    partial_graph: bool,
    exact_outputs: bool,
    kept_by_objects: frozenset[fx.Node] = frozenset(),
    boundaries: frozenset[fx.Node],
    uncheckable: Mapping[fx.Node, str] | None = None,
) -> Choice:
    """Find the domains of a graph with canonical attentions and choose a region for each.

    Args:
        mode: ``"model"`` packs every row-wise node whose padded rows nobody needs; ``"attention"`` only the attentions.
        partial_graph, exact_outputs, kept_by_objects, boundaries, uncheckable: see `demand.analyse`.
    """
    choice = Choice()
    streams = Streams(graph, table)
    _find_domains(graph, table, live, choice, streams)
    domains = list(dict.fromkeys(choice.domains.values()))
    taken: set[fx.Node] = set()
    for domain in sorted(domains, key=lambda d: -len(d.sites)):
        pad_values = PadValues(graph, table, domain, MaskValues(table, domain, boundaries), boundaries, mode == "model")
        analysis = analyse(
            graph,
            table,
            domain,
            pad_values,
            partial_graph=partial_graph,
            exact_outputs=exact_outputs,
            kept_by_objects=kept_by_objects,
            live=live,
            boundaries=boundaries,
            uncheckable=uncheckable,
        )
        choice.analyses[domain] = analysis
        nodes = _region_nodes(graph, table, live, domain, analysis, pad_values, mode) & streams.of(domain)
        nodes -= taken | boundaries
        if mode == "model":
            _drop_torn_results(nodes)
        taken |= nodes
        choice.regions.append(Region(domain, nodes, pad_values))
    _refuse_hidden_queries(choice)
    return choice


def _refuse_hidden_queries(choice: Choice) -> None:
    """A mask that hides queries too: the varlen call knows nothing of it, which is right only where those rows are not run."""
    for site, domain in choice.domains.items():
        hidden = attention_of(site).proof.query  # type: ignore[union-attr]
        own = next((region.domain for region in choice.regions if site in region.nodes), None)
        if hidden is not None and (own is None or own.predicate != hidden):
            leak = choice.analyses[domain].of(site)
            because = f" and {leak.leak.name} {leak.why}" if leak.leak is not None else ""
            choice.refused[site] = f"its mask also hides queries ({hidden.text}){because}"


def _find_domains(
    graph: fx.Graph, table: Mapping[fx.Node, Typing], live: frozenset[fx.Node], choice: Choice, streams: Streams
) -> None:
    found: dict[tuple[object, ...], Domain] = {}
    for node in graph.nodes:
        attention = attention_of(node)
        if attention is None or node not in live:
            continue
        predicate = attention.proof.key
        assert predicate is not None
        key, value = node.args[1], node.args[2]
        batch, position = _token_atoms(table[key].dims, attention.batch)
        identity = (tuple(map(id, batch)), tuple(map(id, position)), predicate)
        domain = found.get(identity) or Domain(len(found), batch, position, predicate)
        reason = _unfit(domain, table, key, value)
        if reason is not None:
            choice.refused[node] = reason
            continue
        found[identity] = domain
        domain.sites.append(node)
        choice.domains[node] = domain
    for domain in found.values():
        domain.shared = any(
            other is not domain and set(other.position) & set(domain.position) and streams.of(other) & streams.of(domain)
            for other in found.values()
        )


def _token_atoms(dims: Dims, batch_size: int | torch.SymInt) -> tuple[list[Atom], list[Atom]]:
    """The atoms of batch and position of a key (B, H, S, D) or (B * H, S, D)."""
    first = leaves(dims[0])
    if len(dims) == 4:
        return first, leaves(dims[2])
    batch: list[Atom] = []
    while first and size_of(batch) != as_size(batch_size):
        batch.append(first.pop(0))
    return batch, leaves(dims[1])


def _unfit(domain: Domain, table: Mapping[fx.Node, Typing], key: fx.Node, value: fx.Node) -> str | None:
    if not domain.position:
        return "the sequences are one token long"
    if set(map(id, domain.batch)) & set(map(id, domain.position)):
        return "its batch and its positions cannot be told apart"
    if layout_of(table[key].dims, domain) is None or layout_of(table[value].dims, domain) is None:
        return "its keys or values do not have one row per masked position"
    return None


def _region_nodes(
    graph: fx.Graph,
    table: Mapping[fx.Node, Typing],
    live: frozenset[fx.Node],
    domain: Domain,
    analysis: Analysis,
    pad_values: PadValues,
    mode: Mode,
) -> set[fx.Node]:
    def harmless(node: fx.Node) -> bool:
        demand = analysis.of(node)
        if pad_values.known(node):
            return True
        return demand == NOTHING if mode == "attention" else demand.leak is None

    nodes: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in live or node.op != "call_function" or not analysis.aligned.get(node, False):
            continue
        if node.target is attention_site:
            if _rows_are_queries(node, table, domain) and harmless(node):
                nodes.add(node)
        elif mode == "model" and _row_wise(node, table, domain) and harmless(node):
            nodes.add(node)
    return nodes


def _rows_are_queries(site: fx.Node, table: Mapping[fx.Node, Typing], domain: Domain) -> bool:
    """Whether the queries of an attention are tokens of the domain. (They may as well be words, and its tokens sentences.)"""
    attention, query = attention_of(site), site.args[0]
    assert attention is not None and isinstance(query, fx.Node)
    in_place = _token_atoms(table[query].dims, attention.batch) == (domain.batch, domain.position)
    return in_place and layout_of(table[site].dims, domain) is not None


def _row_wise(node: fx.Node, table: Mapping[fx.Node, Typing], domain: Domain) -> bool:
    """Whether a node computes each token's row from that token's rows alone, and has a twin."""
    typing = table[node]
    if typing.opaque or not has_twin(node):
        return False
    if isinstance(node.meta.get("val"), (list, tuple)):
        carried = [d is not None and layout_of(d, domain) is not None for d in typing.dims]
        if not carried or not all(carried):
            return False
    elif not is_tensor(node) or layout_of(typing.dims, domain) is None:
        return False
    if node.target is operator.getitem:
        return True
    if not any(is_tensor(x) and layout_of(table[x].dims, domain) is not None for x in node.all_input_nodes):
        return False
    return not any(mixes_tokens(node, x, table, domain) for x in node.all_input_nodes if is_tensor(x))


def _drop_torn_results(nodes: set[fx.Node]) -> None:
    """A node with several results is packed only together with all of them."""
    changed = True
    while changed:
        changed = False
        for node in list(nodes):
            torn = isinstance(node.meta.get("val"), (list, tuple)) and any(user not in nodes for user in node.users)
            orphan = node.target is operator.getitem and node.args[0] not in nodes
            if torn or orphan:
                nodes.discard(node)
                changed = True


def leak_of(node: fx.Node, choice: Choice) -> Demand:
    """Why a node is in no region of its domain: the demand that leaks, or none."""
    domain = choice.domains.get(node)
    return choice.analyses[domain].of(node) if domain is not None else NOTHING
