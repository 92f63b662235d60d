"""Which values of a graph share memory, and which of that memory is written.

There are two answers.  The *traced* one believes the fake tensors: they share a storage where the real ones would, given
the strides that tracing saw; it is what functionalisation, ours and PyTorch's, goes by.  The *possible* one also joins an
operator's result with the arguments that its schema allows it to be a view of (`reshape`, `contiguous`, `to`, ...),
whatever tracing saw; it is for those who must not be surprised.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from varlen_inductor import _compat

aten = torch.ops.aten

# Operators that write to arguments which their schema does not mark as written, and which arguments those are.
_UNMARKED_WRITES: dict[Any, tuple[str, ...]] = {
    aten.batch_norm: ("running_mean", "running_var"),
    aten.instance_norm: ("running_mean", "running_var"),
    aten.native_batch_norm: ("running_mean", "running_var"),
    aten.cudnn_batch_norm: ("running_mean", "running_var"),
    aten.miopen_batch_norm: ("running_mean", "running_var"),
}

# Their "write" changes only whether autograd follows, not the data.
_NO_DATA_WRITTEN = frozenset({aten.detach_.default, aten.requires_grad_.default})

# Higher-order operators that compute and write nothing, whatever functions they carry.
_PURE_HIGHER_ORDER = frozenset({"flex_attention"})


class Storages:
    """Union-find over the nodes of a graph: two nodes are in one class if their values may share memory.

    Args:
        graph: with `meta["val"]` on its nodes.
        possible: join what may share memory, not only what did when it was traced.
    """

    def __init__(self, graph: fx.Graph, *, possible: bool) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        by_storage: dict[int, fx.Node] = {}
        for node in graph.nodes:
            owned = set(storages_of(node))
            if len(owned) == 1 or possible:
                # What returns several new tensors has no memory of its own: each of them has.
                for storage in owned:
                    self._join(node, by_storage.setdefault(storage, node))
            if possible or not _memory_is_known(node):
                for source in aliased_inputs(node):
                    self._join(node, source)

    def root(self, node: fx.Node) -> fx.Node:
        """The representative of the class that `node` is in."""
        path = []
        while (parent := self._parent.get(node, node)) is not node:
            path.append(node)
            node = parent
        for passed in path:
            self._parent[passed] = node
        return node

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        self._parent[self.root(a)] = self.root(b)


def _memory_is_known(node: fx.Node) -> bool:
    """Whether the fake tensors of `node` tell what it is a view of: what a higher-order operator returns is made up."""
    return "val" in node.meta and not isinstance(node.target, HigherOrderOperator)


def storages_of(node: fx.Node) -> Iterator[int]:
    """Identities of the storages behind the fake tensors that `node` holds."""
    for value in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            yield _compat.storage_id(value)


def aliased_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The inputs that the result of `node` may be a view of."""
    if node.op != "call_function":
        return
    if node.target is operator.getitem:
        yield from node.all_input_nodes[:1]
    elif isinstance(node.target, OpOverload):
        for name, value in _named_arguments(node):
            info = name.alias_info
            view = info is not None or (_may_alias_unmarked(node.target) and isinstance(value, fx.Node))
            if view:
                yield from (n for n in _nodes_in(value) if not _copied(node, n))
    elif node.target not in _WITHOUT_TENSORS:
        # A higher-order operator, or a function of which nothing is known.
        yield from node.all_input_nodes


def _may_alias_unmarked(target: OpOverload) -> bool:
    if target.overloadpacket in _UNMARKED_WRITES:
        return False
    tag = getattr(torch.Tag, "maybe_aliasing_or_mutating", None)
    return (tag is not None and tag in target.tags) or target.overloadpacket in (aten.type_as, aten._unsafe_view, aten.dropout)


def _copied(node: fx.Node, source: fx.Node) -> bool:
    """Whether the fake tensors prove that `node` is a copy: it has another dtype or device and is no reinterpreting view."""
    value, original = node.meta.get("val"), source.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(original, torch.Tensor):
        return False
    if node.target.overloadpacket is aten.view:  # type: ignore[union-attr]
        return False
    return value.dtype != original.dtype or value.device != original.device


def written_nodes(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments whose memory `node` writes, or may write."""
    if node.op != "call_function" or node.target in _NO_DATA_WRITTEN or node.target in _WITHOUT_TENSORS:
        return
    if isinstance(node.target, OpOverload):
        unmarked = _UNMARKED_WRITES.get(node.target.overloadpacket, ())
        for argument, value in _named_arguments(node):
            marked = argument.alias_info is not None and argument.alias_info.is_write
            if marked or argument.name in unmarked:
                yield from _nodes_in(value)
    elif isinstance(node.target, HigherOrderOperator):
        if _higher_order_may_write(node):
            yield from node.all_input_nodes
    elif node.target is not operator.getitem and any(_holds_tensor(n) for n in node.all_input_nodes):
        yield from node.all_input_nodes


_WITHOUT_TENSORS = frozenset(
    {
        _compat.SET_GRAD_ENABLED,
        _compat.ENTER_AUTOCAST,
        _compat.EXIT_AUTOCAST,
    }
)


def _named_arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    assert isinstance(node.target, OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            yield argument, node.args[position]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _holds_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return value is None or any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value))


def _higher_order_may_write(node: fx.Node) -> bool:
    """Look into the functions that a higher-order operator carries for anything that writes in place."""
    if node.target._name in _PURE_HIGHER_ORDER:  # type: ignore[union-attr]
        return False
    owner = node.graph.owning_module
    bodies = [operator.attrgetter(str(n.target))(owner) for n in node.all_input_nodes if n.op == "get_attr"]
    bodies = [b for b in bodies if isinstance(b, fx.GraphModule)]
    return not bodies or any(_call_may_write(n, body) for body in bodies for n in body.graph.nodes)


def _call_may_write(node: fx.Node, body: fx.GraphModule) -> bool:
    """`node` is a call as Dynamo records it: a method, a function of torch, an operator of Python."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    if node.op == "call_module":
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable or node.target.overloadpacket in _UNMARKED_WRITES
    if isinstance(node.target, HigherOrderOperator):
        return _higher_order_may_write(node)
    name = getattr(node.target, "__name__", "")
    if node.target in _WITHOUT_TENSORS or node.target is operator.getitem:
        return False
    in_place_operator = getattr(node.target, "__module__", "") == "_operator" and (name.startswith("i") and name not in _I_PURE)
    return (
        in_place_operator
        or (name.endswith("_") and not name.endswith("__"))
        or name in ("setitem", "batch_norm", "instance_norm")
        or node.kwargs.get("out") is not None
        or _asks_for_in_place(node)
    )


_I_PURE = frozenset({"invert", "inv", "index", "indexOf", "is_", "is_not", "itemgetter"})


def _asks_for_in_place(node: fx.Node) -> bool:
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return bool(node.kwargs.get("inplace", False))
    return bool(bound.arguments.get("inplace", False))
