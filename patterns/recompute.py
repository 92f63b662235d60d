"""Activation checkpointing: what the user wants computed again in the backward is, packed.

Dynamo makes of `torch.utils.checkpoint` an operator that is given a graph. `normalise` records the nodes of that graph in the
place of the call and marks them, so that all passes see one graph; in the rewritten graph each stretch of marked nodes becomes
such a call again.

    before                                                after
    %h = checkpoint(%wrap_body_0, %x, %mask, %w)          %pack = pack(%x, %index, %inverse)
                                                          %call = checkpoint(%recomputed_0, %pack, %w, %cu_seqlens)
                                                          %h = getitem(%call, 0)
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from varlen_inductor import _compat

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_KEY = "varlen_recomputed"
_SIZES = frozenset({torch.ops.aten.sym_size.int, operator.mul, operator.add, operator.floordiv, torch.sym_max})
_OPTIONS_WITHOUT_EFFECT = frozenset({"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"})


class NotRegroupable(Exception):
    """A rewritten graph whose marked nodes cannot be made calls again; ``reason`` says why, in words for the user."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# --- into the graph -----------------------------------------------------------------------------------------------------------


def body_of(node: fx.Node) -> fx.GraphModule | None:
    """The graph that a higher-order call is given first, if it is one."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or first.op != "get_attr":
        return None
    owner = node.graph.owning_module
    assert owner is not None
    body = operator.attrgetter(str(first.target))(owner)
    return body if isinstance(body, fx.GraphModule) else None


def refusal(node: fx.Node) -> str | None:
    """Why the graph of a checkpoint cannot be recorded in its place, in words for the user, or None if it can."""
    body = body_of(node)
    if body is None:
        return "its graph is not known"
    if "_checkpoint_context_fn" in body.meta:
        return "it chooses by itself what to save (context_fn)"
    unknown = set(node.kwargs) - _OPTIONS_WITHOUT_EFFECT
    if unknown:
        return f"it has the option {min(unknown)}"
    for inner in body.graph.nodes:
        reason = _unfit(inner)
        if reason is not None:
            return reason
    return None


def _unfit(node: fx.Node) -> str | None:
    if node.op == "get_attr" and not any(user.target is CHECKPOINT for user in node.users):
        return "it holds a constant of its own"
    if node.target is _compat.SET_GRAD_ENABLED:
        return "it switches gradients on or off"
    if node.target is _compat.ENTER_AUTOCAST:
        return "it enters autocast"
    if isinstance(node.target, HigherOrderOperator):
        return refusal(node) if node.target is CHECKPOINT else f"it calls {node.target}"
    return None


def mark(nodes: Iterable[fx.Node], group: int) -> None:
    """Note that the nodes are computed again in the backward, together with all others of the group."""
    for node in nodes:
        node.meta[_KEY] = group


def group_of(node: fx.Node) -> int | None:
    """The group that a node was marked with."""
    return node.meta.get(_KEY)


def mark_like(nodes: Iterable[fx.Node], like: fx.Node) -> None:
    """Note that what takes the place of ``like`` is computed again if that is."""
    group = group_of(like)
    if group is not None:
        mark(nodes, group)


# --- out of it again ------------------------------------------------------------------------------------------------------------


def regroup(gm: fx.GraphModule) -> fx.GraphModule:
    """Make each stretch of marked nodes one call of checkpoint.

    All that stands between the first and the last node of a group belongs to it.

    Raises:
        NotRegroupable: something in a stretch cannot be in such a call.
    """
    groups = _stretches(gm.graph)
    if not groups:
        return gm
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    starts = {stretch[0]: number for number, stretch in enumerate(groups)}
    inside = {node for stretch in groups for node in stretch}
    for node in gm.graph.nodes:
        if node in starts:
            _emit_call(gm, graph, copies, groups[starts[node]], f"recomputed_{starts[node]}")
        if node not in inside and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.lint()
    return fx.GraphModule(gm, graph)


def _stretches(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes of each group, in the order of the graph."""
    nodes = list(graph.nodes)
    ends: dict[int, tuple[int, int]] = {}
    for i, node in enumerate(nodes):
        group = group_of(node)
        if group is not None and node.op not in ("placeholder", "output"):
            ends[group] = (ends.get(group, (i, i))[0], i)
    ordered = sorted(ends.values())
    if any(second[0] <= first[1] for first, second in itertools.pairwise(ordered)):
        raise NotRegroupable("what its checkpoints compute is interleaved")
    return [nodes[first : last + 1] for first, last in ordered]


def _emit_call(gm: fx.GraphModule, graph: fx.Graph, copies: dict[fx.Node, fx.Node], stretch: list[fx.Node], name: str) -> None:
    """Emit one stretch: what it needs not recompute (constants, sizes), then the call, then its results."""
    members = set(stretch)
    for node in stretch:
        if node.op == "get_attr" or (node.target in _SIZES and all(x in copies for x in node.all_input_nodes)):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            members.discard(node)
    # Results must be tensors: elements of a tuple leave it inside.
    for node in list(members):
        members.update(user for user in node.users if user.target is operator.getitem)
    body = sorted(members)
    results = [node for node in body if any(user not in members for user in node.users)]
    for node in body:
        _refuse_unfit(node, members, node in results)
    inputs = list(dict.fromkeys(x for node in body for x in node.all_input_nodes if x not in members))
    if not body or not results:
        return
    gm.add_submodule(name, _body(gm, body, inputs, results))
    call = graph.call_function(CHECKPOINT, (graph.get_attr(name), *(copies[x] for x in inputs)), {"use_reentrant": False})
    call.meta.update({k: v for k, v in body[0].meta.items() if k in ("stack_trace", "nn_module_stack")})
    for i, node in enumerate(results):
        copies[node] = graph.call_function(operator.getitem, (call, i))
        copies[node].meta = {k: v for k, v in node.meta.items() if k != _KEY}
    for node in body:
        copies.setdefault(node, call)  # so that it is not emitted again


def _body(gm: fx.GraphModule, nodes: list[fx.Node], inputs: list[fx.Node], results: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {x: graph.placeholder(x.name) for x in inputs}
    for x, placeholder in copies.items():
        placeholder.meta = {k: v for k, v in x.meta.items() if k in ("val", "example_value")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    graph.lint()
    return fx.GraphModule(gm, graph)


def _refuse_unfit(node: fx.Node, members: set[fx.Node], leaves: bool) -> None:
    if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        raise NotRegroupable(f"a checkpoint in it writes in place ({node.target})")
    if node.target is _compat.SET_GRAD_ENABLED or isinstance(node.target, HigherOrderOperator):
        raise NotRegroupable(f"a checkpoint in it would hold {node.target}")
    if node.target in (_compat.ENTER_AUTOCAST, _compat.EXIT_AUTOCAST):
        raise NotRegroupable("a checkpoint in it would enter or leave autocast")
    if leaves and node.target in _SIZES:
        raise NotRegroupable("a size that is computed in a checkpoint is used outside of it")
