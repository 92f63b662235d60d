"""Take out what nothing needs, and operators that do nothing: `x[:]`, `.to()` the dtype it has, `expand` and `view` to the
shape it has, dropout in inference, `detach` of what has no gradient.

    before                                                              after
    %s = aten.slice.Tensor(%k, 0, 0, 9223372036854775807)               %u = aten.unsqueeze.default(%k, 2)
    %u = aten.unsqueeze.default(%s, 2)
    %t = aten.to.dtype(%u, torch.float32)     # it is float32
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._ops import OpOverload

from .aliasing import Storages, storages_of, written_nodes
from .nodes import arguments, calls, same_size

aten = torch.ops.aten

# Each returns its first argument, or a view that shows all of it, when shape, strides and dtype do not change.  Not
# `contiguous`: it does something as soon as what stands before it is replaced by an operator with other strides.
_IDENTITIES = (
    aten.slice, aten.to, aten.expand, aten.view, aten.reshape, aten.alias, aten.type_as,
    aten.view_as, aten.reshape_as, aten.expand_as, aten.flatten, aten.narrow, aten.positive,
)  # fmt: skip
_UNLESS_GRADIENT = (aten.detach, aten.detach_)


def drop_identities(graph: fx.Graph) -> None:
    """Let everything but the output read what is behind an operator that does nothing.

    The output keeps it: whether a returned tensor *is* an input or a view of one, the caller can tell.
    """
    written: set[fx.Node] = set()
    storages = Storages(graph, possible=True)
    for node in graph.nodes:
        written.update(storages.root(w) for w in written_nodes(node))
    for node in list(graph.nodes):
        if not _is_identity(node) and not (_is_idle_dropout(node) and storages.root(node) not in written):
            continue
        source = node.args[0]
        node.replace_all_uses_with(source, delete_user_cb=lambda user: user.op != "output")
        if not node.users:
            graph.erase_node(node)


def inline_numbers(graph: fx.Graph) -> None:
    """`torch.tensor(-1e9)` becomes `aten.full([], -1e9)`.

    The number is then in the graph for all to read, and the module holds no tensor, which would be one more input.
    """
    for node in list(graph.nodes):
        if not calls(node, aten.lift_fresh_copy, aten.lift_fresh) or node.args[0].op != "get_attr":
            continue
        literal = operator.attrgetter(str(node.args[0].target))(graph.owning_module)
        if literal.dim() or literal.device.type != "cpu" or literal.is_complex() or literal.requires_grad:
            continue
        like = {"dtype": literal.dtype, "device": literal.device, "pin_memory": False}
        with graph.inserting_before(node):
            number = graph.call_function(aten.full.default, ([], literal.item()), like)
        number.meta = dict(node.meta)
        node.replace_all_uses_with(number)
        graph.erase_node(node)


def drop_unused(graph: fx.Graph) -> None:
    """Erase what nothing reads and what has no effect.

    Stricter than FX's own dead code elimination: a higher-order operator, or batch norm with running statistics, may write
    without saying so, and an operator that draws random numbers moves the generator.
    """
    for node in reversed(list(graph.nodes)):
        if not node.users and _without_effect(node):
            graph.erase_node(node)


def _without_effect(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return not node.is_impure() and not any(written_nodes(node))
    return node.target is operator.getitem or isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def _is_idle_dropout(node: fx.Node) -> bool:
    """Dropout in inference: traced as a copy, so it may go only if no copy is needed."""
    if not calls(node, aten.dropout):
        return False
    given = arguments(node)
    return given["train"] is False or given["p"] == 0


def _is_identity(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if calls(node, *_UNLESS_GRADIENT):
        if node.args[0].meta.get("requires_grad", True):
            return False
    elif not calls(node, *_IDENTITIES):
        return False
    value, source = node.meta.get("val"), node.args[0].meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(source, torch.Tensor):
        return False
    return (
        set(storages_of(node)) == set(storages_of(node.args[0]))
        and value.dtype == source.dtype
        and value.dim() == source.dim()
        and all(map(same_size, value.shape, source.shape))
        and all(map(same_size, value.stride(), source.stride()))
        and same_size(value.storage_offset(), source.storage_offset())
    )
