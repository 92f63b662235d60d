"""Put a new operator into a graph together with what passes read from its meta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from varlen_inductor import _compat

_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr")


def emit(graph: fx.Graph, like: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Call `target` at the insertion point of `graph`, on behalf of `like`, whose place in the user's source it takes over.

    The node's `val` is what the operator makes of the fake values of its arguments.
    """
    node = graph.call_function(target, args, kwargs)
    node.meta = {key: like.meta[key] for key in _PROVENANCE if key in like.meta}
    values, keyword_values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = _compat.run_fake(target, values, keyword_values)
    node.meta["requires_grad"] = any(n.meta.get("requires_grad", False) for n in node.all_input_nodes)
    return node


def shape_arguments(graph: fx.Graph, like: fx.Node) -> list[int | fx.Node]:
    """The shape of `like` as arguments of an operator: numbers where it is static, nodes where it is not."""
    sizes: list[int | fx.Node] = []
    for dim, size in enumerate(like.meta["val"].shape):
        if isinstance(size, torch.SymInt):
            sizes.append(emit(graph, like, torch.ops.aten.sym_size.int, like, dim))
        else:
            sizes.append(size)
    return sizes
