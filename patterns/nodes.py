"""Reading a normalised graph: what an operator's arguments are, what a node's value is, what still matters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from .dims import as_size

aten = torch.ops.aten


def overload_packet(node: Any) -> Any:
    """The operator that a node calls, whichever overload (`aten.add` for `aten.add.Tensor`); None for what is no operator."""
    if isinstance(node, fx.Node) and node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket
    return None


def calls(node: Any, *packets: Any) -> bool:
    """Whether `node` calls one of these operators."""
    packet = overload_packet(node)
    return packet is not None and packet in packets


def operator_name(node: fx.Node) -> str:
    """What the user would call the operator: `tanh` for `aten.tanh.default`."""
    packet = overload_packet(node)
    return str(node.target) if packet is None else packet.__name__


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator's node by name, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def call_like(like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node in the graph of ``like``, at its point of insertion, with what is known of ``like`` and its own fake value."""
    new = like.graph.call_function(target, args, kwargs)
    new.meta = {**like.meta, "val": target(*fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)}
    return new


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor that a node holds, None if it holds none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal whatever the symbols in them stand for."""
    one: Any = as_size(a)
    return bool(one == as_size(b))


def live_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes on which an output or an effect depends."""
    live: set[fx.Node] = set()
    # Random operators advance the generator but nothing reads what unused ones draw.
    stack = [n for n in graph.nodes if n.op == "output" or n.is_impure(impure_random=False)]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(node.all_input_nodes)
    return frozenset(live)


def draws_random_numbers(gm: fx.GraphModule) -> bool:
    """Whether some operator of the graph, or of one that a higher-order operator is given, draws random numbers."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return any(_draws(node) for graph in graphs for node in graph.nodes)


def _draws(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = arguments(node)
    probability = given.get("dropout_p", given.get("p", 1.0))
    return probability != 0.0 and given.get("train", True) is not False


def in_graph_order(graph: fx.Graph, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    wanted = set(nodes)
    return tuple(n for n in graph.nodes if n in wanted)
