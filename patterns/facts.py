"""Facts about the data that a packed graph relies on, and the graph that finds them out before it runs.

The *plan graph* takes the same inputs as the model's graph and returns the mask of valid positions of each domain, then one
flag for each fact. It runs first; if a flag is false the padded graph runs instead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from varlen_inductor import _compat

from .demand import Read, ancestors_of
from .dims import Dims, as_size
from .domain import Domain, token_dims
from .oprules import Args, Typing, is_tensor, op_name
from .regions import Choice
from .site import attention_of

aten = torch.ops.aten
_MOST_NODES = 500
# Operators that cost as much as a layer of the model: what needs them is not found out beforehand.
_COSTLY = frozenset(
    "linear addmm baddbmm matmul mm bmm einsum conv1d conv2d conv3d convolution scaled_dot_product_attention "
    "lstm gru rnn_tanh".split()
)


@dataclass(frozen=True)
class Fact:
    """``text`` for the user; ``emit(graph, mask_of)`` adds its 0-d bool to the source graph, given the masks of the domains.

    ``about`` tells facts with the same text apart: names of tensors are those of the user's source, and not unique.
    ``asker`` is the attention, or the operation that reads some rows, for whose sake the fact is needed.
    """

    text: str
    emit: Callable[[fx.Graph, dict[Domain, fx.Node]], fx.Node]
    about: object
    asker: fx.Node


class FactNotCheckable(Exception):
    """A fact that cannot be found out before the graph runs; ``asker`` as for `Fact`, None if it is the mask of a domain."""

    def __init__(self, reason: str, asker: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.asker = asker


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
    facts: dict[tuple[object, str], Fact] = {}
    for site in choice.domains:
        for fact in facts_of_site(choice, site, windows_by_rank=True):
            facts.setdefault((fact.about, fact.text), fact)
    for region in choice.regions:
        analysis = choice.analyses[region.domain]
        reads = {read for node in region.nodes if not region.pad_values.known(node) for read in analysis.of(node).reads}
        found = [_harmless(read, region.domain, table) for read in sorted(reads, key=lambda r: (r.node.name, r.position))]
        for fact in [*found, *(_never_empty(region.domain, node) for node in region.pad_values.nonempty)]:
            facts.setdefault((fact.about, fact.text), fact)
    return list(facts.values())


def facts_of_site(choice: Choice, site: fx.Node, *, windows_by_rank: bool) -> list[Fact]:
    """What rewriting one attention takes for granted.

    ``windows_by_rank``: a window is measured between ranks of valid positions, not between the positions (rule 8).
    """
    attention, domain = attention_of(site), choice.domains[site]
    assert attention is not None
    facts = [Fact(o.text, lambda graph, masks, o=o: o.emit(graph), o.leaf, site) for o in attention.proof.obligations]  # type: ignore[misc]
    own = next((r for r in choice.regions if site in r.nodes), None)
    same_domain = own is not None and own.domain is domain
    if windows_by_rank and same_domain and windowed(site) and not domain.predicate.is_prefix:
        facts.append(_contiguous(domain, site))
    if not same_domain and attention.proof.no_valid_key != "zero":
        # A valid query of its own domain sees at least itself.
        facts.append(_always_a_key(domain, site))
    return facts


def _call(graph: fx.Graph, target: Callable[..., object], *args: object, **kwargs: object) -> fx.Node:
    return graph.call_function(target, args, kwargs)  # type: ignore[arg-type]


def _contiguous(domain: Domain, site: fx.Node) -> Fact:
    def emit(graph: fx.Graph, masks: dict[Domain, fx.Node]) -> fx.Node:
        mask = masks[domain]
        starts = _call(graph, aten.diff.default, _call(graph, aten.to.dtype, mask, torch.int8))
        rising = _call(graph, aten.sum.dim_IntList, _call(graph, aten.gt.Scalar, starts, 0), [1])
        first = _call(graph, aten.select.int, mask, 1, 0)
        return _call(graph, aten.all.default, _call(graph, aten.le.Scalar, _call(graph, aten.add.Tensor, rising, first), 1))

    return Fact(f"the valid positions of each sequence are contiguous ({domain.predicate.text})", emit, domain, site)


def _never_empty(domain: Domain, asker: fx.Node) -> Fact:
    def emit(graph: fx.Graph, masks: dict[Domain, fx.Node]) -> fx.Node:
        return _call(graph, aten.all.default, _call(graph, aten.any.dim, masks[domain], 1))

    return Fact(f"every sequence has a valid position ({domain.predicate.text})", emit, domain, asker)


def _always_a_key(domain: Domain, site: fx.Node) -> Fact:
    """Every query of ``site`` sees a key (rule 9): what eager gives one that sees none is not what the varlen call gives."""
    attention = attention_of(site)
    assert attention is not None
    left, right = attention.proof.window_left, attention.proof.window_right
    if (left, right) == (-1, -1):
        return _never_empty(domain, site)
    queries, keys = (x.meta["val"].shape[-2] for x in site.args[:2])  # type: ignore[union-attr]
    if as_size(queries) != as_size(keys):
        raise FactNotCheckable("it has a window, another number of queries than keys, and maybe queries that see no key", site)

    def emit_window(graph: fx.Graph, masks: dict[Domain, fx.Node]) -> fx.Node:
        mask = masks[domain]
        count = _call(graph, aten.cumsum.default, mask, 1)  # valid keys up to and with each position
        before = _call(graph, aten.constant_pad_nd.default, count, [1, 0])
        position = _call(
            graph, aten.sub.Tensor, _call(graph, aten.cumsum.default, _call(graph, aten.ones_like.default, mask), 1), 1
        )
        size = _call(graph, aten.sym_size.int, mask, 1)

        def counted(offset: int) -> fx.Node:
            """How many valid keys lie before position + offset."""
            at = _call(graph, aten.clamp.default, _call(graph, aten.add.Scalar, position, offset), 0)
            return _call(graph, aten.gather.default, before, 1, _call(graph, aten.clamp_max.default, at, size))

        low = _call(graph, aten.zeros_like.default, count) if left == -1 else counted(-left)
        high = _call(graph, aten.slice.Tensor, count, 1, -1) if right == -1 else counted(right + 1)
        return _call(graph, aten.all.default, _call(graph, aten.gt.Tensor, high, low))

    return Fact(f"every query sees a key ({attention.proof.description})", emit_window, (domain, left, right), site)


def _harmless(read: Read, domain: Domain, table: dict[fx.Node, Typing]) -> Fact:
    text = domain.predicate.text
    if read.kind == "position":

        def emit_position(graph: fx.Graph, masks: dict[Domain, fx.Node]) -> fx.Node:
            # A slice and not a selection: a model that reads `[:, :4]` may be given sequences that are shorter.
            end = read.position + 1 or None
            return _call(graph, aten.all.default, _call(graph, aten.slice.Tensor, masks[domain], 1, read.position, end))

        return Fact(f"position {read.position} of every sequence is valid ({text})", emit_position, domain, read.node)
    if read.kind == "index":
        indices = read.node.args[1]
        assert isinstance(indices, (list, tuple))

        def emit_index(graph: fx.Graph, masks: dict[Domain, fx.Node]) -> fx.Node:
            return _call(graph, aten.all.default, _call(graph, aten.index.Tensor, masks[domain], list(indices)))

        return Fact(f"the position that {read.node.name} reads in every sequence is valid ({text})", emit_index, domain, read.node)
    a = Args(read.node, table)
    if read.kind == "gather":
        dim, index, dims = a["dim"], a["index"], table[a["self"]].dims

        def emit_gather(graph: fx.Graph, masks: dict[Domain, fx.Node]) -> fx.Node:
            valid = _spread(graph, masks[domain], dims, domain, index)
            return _call(graph, aten.all.default, _call(graph, aten.gather.default, valid, dim, index))

        return Fact(f"the position that {read.node.name} reads in every sequence is valid ({text})", emit_gather, domain, read.node)
    target, ignore = a["target"], a["ignore_index"]

    def emit_loss(graph: fx.Graph, masks: dict[Domain, fx.Node]) -> fx.Node:
        ignored = _call(graph, aten.eq.Scalar, target, ignore)
        valid = _call(graph, aten.reshape.default, masks[domain], [-1])
        return _call(graph, aten.all.default, _call(graph, aten.logical_or.default, ignored, valid))

    return Fact(f"the labels of {read.node.name} are {ignore} at padded positions ({text})", emit_loss, domain, read.node)


def _spread(graph: fx.Graph, mask: fx.Node, dims: Dims, domain: Domain, like: fx.Node) -> fx.Node:
    """The mask along the batch and the positions of ``dims``, the same over the others, which are as long as in ``like``."""
    tokens = token_dims(dims, domain)
    assert tokens is not None
    batch, position = tokens
    if batch is None:
        mask = _call(graph, aten.reshape.default, mask, [-1])
    elif batch > position:
        mask = _call(graph, aten.transpose.int, mask, 0, 1)
    others = [i for i in range(len(dims)) if i not in tokens]
    for i in others:
        mask = _call(graph, aten.unsqueeze.default, mask, i)
    sizes = [_call(graph, aten.sym_size.int, like, i) if i in others else -1 for i in range(len(dims))]
    return _call(graph, aten.expand.default, mask, sizes)


def _check_can_run_first(wanted: fx.Node, written: frozenset[fx.Node], asker: fx.Node | None) -> None:
    """The plan runs before the graph, on the same inputs: it must be cheap, leave no trace, and find what the graph will find."""
    needed = ancestors_of(wanted)
    for node in needed:
        reason = _unfit_for_plan(node, written)
        if reason is not None:
            raise FactNotCheckable(f"it depends on `{node.name}`, which {reason}", asker)
    if len(needed) > _MOST_NODES:
        raise FactNotCheckable(f"it takes {len(needed)} operations to compute", asker)


def _unfit_for_plan(node: fx.Node, written: frozenset[fx.Node]) -> str | None:
    if node in written:
        return "is written in place"
    if node.op == "placeholder":
        learned = is_tensor(node) and node.meta.get("requires_grad", False) and _compat.is_parameter_or_buffer(node)
        return "is learned" if learned else None
    if node.op == "get_attr":
        return None
    if attention_of(node) is not None or op_name(node) in _COSTLY:
        return "is computed by the model itself"
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.is_mutable:
            return "is written in place"
        return "is random" if torch.Tag.nondeterministic_seeded in node.target.tags else None
    if node.target is operator.getitem or getattr(node.target, "__module__", "") in ("_operator", "math", "torch"):
        return None
    return "is computed by an operator that cannot be run twice"


def plan_graph(
    gm: fx.GraphModule, domains: Sequence[Domain], facts: Sequence[Fact], written: frozenset[fx.Node] = frozenset()
) -> fx.GraphModule:
    """The plan graph; see the module's docstring.

    Args:
        written: every value whose storage is written somewhere.

    Raises:
        FactNotCheckable: something would take the model itself, or a write, to find out.
    """
    graph = gm.graph
    before = set(graph.nodes)
    output = next(n for n in graph.nodes if n.op == "output")
    try:
        with graph.inserting_before(output):
            masks = {domain: emit_mask(graph, domain) for domain in domains}
            for mask in masks.values():
                _check_can_run_first(mask, written, None)
            flags = [fact.emit(graph, masks) for fact in facts]
        for fact, flag in zip(facts, flags):
            _check_can_run_first(flag, written, fact.asker)
        return _extract(gm, [*masks.values(), *flags])
    finally:
        for node in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(node)


def emit_mask(graph: fx.Graph, domain: Domain) -> fx.Node:
    """The (B, S) bool of a domain's valid positions, at the graph's insertion point.

    Raises:
        FactNotCheckable: its sizes cannot be computed from those of the inputs.
    """
    try:
        return domain.predicate.emit(graph, *mask_sizes(domain))
    except ValueError as error:
        raise FactNotCheckable(str(error)) from error


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
