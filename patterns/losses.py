"""Token losses in one spelling: cross entropy over all tokens, with labels that say which count.

    before                                                     after
    %s = aten.slice.Tensor(%logits, 1, 0, -1)                  %x = aten.reshape.default(%logits, [B * S, V])
    %x = aten.reshape.default(%s, [B * (S - 1), V])            %p = aten.constant_pad_nd.default(%labels, [0, 1], -100)
    %l = aten.cross_entropy_loss.default(%x, %labels)          %l = aten.cross_entropy_loss.default(%x, %p)

A slice of the logits moves no token, but to the packer it is a tensor of other tokens. Over all positions, the last one with a
label that is ignored, the loss is the same number, and it can be computed on packed rows.

Losses that are a number for each element are that, and then a sum or a mean, of which the packer knows what it needs.

    %l = aten.mse_loss.default(%x, %y)                         %e = aten.mse_loss.default(%x, %y, 0)
                                                               %l = aten.mean.default(%e)
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from varlen_inductor import _compat

from . import recompute
from .dims import as_size
from .emit import emit
from .nodes import arguments, aten, calls, shape

_OF_TOKENS = (aten.cross_entropy_loss, aten.nll_loss_nd)
_OF_ELEMENTS = (
    aten.mse_loss, aten.l1_loss, aten.smooth_l1_loss, aten.huber_loss, aten.binary_cross_entropy, aten.kl_div,
    aten.binary_cross_entropy_with_logits, aten.soft_margin_loss, aten.poisson_nll_loss,
)  # fmt: skip
_KEYWORDS = {"log_target"}
_NONE, _MEAN = 0, 1  # values of `reduction`; the other is a sum
_FLATTENING = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.contiguous, aten.clone)
_BATCHED = 3


def spell_losses(graph: fx.Graph, written: frozenset[fx.Node]) -> None:
    """Bring all losses into one spelling, in place; see the module's docstring.

    Args:
        graph: normalised and functionalised.
        written: values whose storage is written somewhere; losses of labels that read them stay as they are.
    """
    for node in list(graph.nodes):
        if calls(node, *_OF_ELEMENTS) and arguments(node)["reduction"] != _NONE:
            _reduce_apart(graph, node)
    complete_losses(graph, written)


def _reduce_apart(graph: fx.Graph, node: fx.Node) -> None:
    """A loss of elements as a loss without reduction, and the reduction."""
    given = arguments(node)
    reduction = aten.mean.default if given["reduction"] == _MEAN else aten.sum.default
    given["reduction"] = _NONE
    options = {name: given.pop(name) for name in _KEYWORDS & set(given)}
    with graph.inserting_before(node):
        elements = emit(graph, node, node.target, *given.values(), **options)  # type: ignore[arg-type]
        _as_autocast_has_it(elements, node)
        reduced = emit(graph, node, reduction, elements)
    recompute.mark_like((elements, reduced), node)
    node.replace_all_uses_with(reduced)
    graph.erase_node(node)


def _as_autocast_has_it(made: fx.Node, like: fx.Node) -> None:
    """The dtype of ``like``, which may be that of autocast, for what was made outside of it."""
    dtype = like.meta["val"].dtype
    if made.meta["val"].dtype != dtype:
        made.meta["val"] = _compat.run_fake(aten.to.dtype, (made.meta["val"], dtype), {})


def complete_losses(graph: fx.Graph, written: frozenset[fx.Node]) -> None:
    """Rewrite each cross entropy over (B, V, S), or over all but the last position, to one over (B * S, V), in place.

    Args:
        graph: normalised and functionalised.
        written: values whose storage is written somewhere; losses that read them stay as they are.
    """
    for node in list(graph.nodes):
        if not calls(node, *_OF_TOKENS):
            continue
        given = arguments(node)
        logits, target = given["self"], given["target"]
        if given["reduction"] == _NONE or target.meta["val"].is_floating_point() or {logits, target} & written:
            continue
        if len(shape(logits)) == _BATCHED and len(shape(target)) == _BATCHED - 1:
            _flatten(graph, node, logits, target)
        _complete(graph, node, written)


def _set_operands(node: fx.Node, logits: fx.Node, target: fx.Node) -> None:
    kwargs = {name: value for name, value in node.kwargs.items() if name not in ("self", "target")}
    node.args, node.kwargs = (logits, target, *node.args[2:]), kwargs


def _flatten(graph: fx.Graph, node: fx.Node, logits: fx.Node, target: fx.Node) -> None:
    """(B, V, S) and (B, S) to (B * S, V) and (B * S,)."""
    with graph.inserting_before(node):
        given = arguments(logits) if calls(logits, aten.transpose) else {}
        if sorted(d % _BATCHED for d in (given.get("dim0", 0), given.get("dim1", 0))) == [1, 2]:
            rows = given["self"]
        else:
            rows = emit(graph, node, aten.transpose.int, logits, 1, 2)
        flat = emit(graph, node, aten.reshape.default, rows, [-1, _size_argument(graph, node, shape(rows)[2])])
        labels = emit(graph, node, aten.reshape.default, target, [-1])
    _set_operands(node, flat, labels)
    if rows is not logits and not logits.users:
        graph.erase_node(logits)


def _complete(graph: fx.Graph, node: fx.Node, written: frozenset[fx.Node]) -> None:
    """Undo a slice that drops the last position of the logits."""
    given = arguments(node)
    chain = _chain_to_slice(given["self"], written)
    if chain is None:
        return
    piece = chain[-1]
    whole = piece.args[0]
    assert isinstance(whole, fx.Node)
    value = whole
    for link in reversed(chain[:-1]):
        if not calls(link, *_FLATTENING):
            with graph.inserting_before(link):
                value = _again(graph, link, value)
    with graph.inserting_before(node):
        batch = _size_argument(graph, node, shape(whole)[0])
        flat = emit(graph, node, aten.reshape.default, value, [-1, _size_argument(graph, node, shape(value)[2])])
        labels = emit(graph, node, aten.reshape.default, given["target"], [batch, -1])
        labels = emit(graph, node, aten.constant_pad_nd.default, labels, [0, 1], given["ignore_index"])
        labels = emit(graph, node, aten.reshape.default, labels, [-1])
    _set_operands(node, flat, labels)
    for link in chain:
        if not link.users:
            graph.erase_node(link)


def _again(graph: fx.Graph, link: fx.Node, value: fx.Node) -> fx.Node:
    """The operator of ``link`` on all positions; its dtype may be autocast's."""
    made = emit(graph, link, link.target, value, *link.args[1:], **link.kwargs)  # type: ignore[arg-type]
    _as_autocast_has_it(made, link)
    return made


def _chain_to_slice(logits: Any, written: frozenset[fx.Node]) -> list[fx.Node] | None:
    """The operators from ``logits`` (N, V) back to a slice of (B, S, E) that drops the last position, all used just once."""
    chain: list[fx.Node] = []
    node = logits
    while isinstance(node, fx.Node) and node not in written and len(node.users) == 1:
        chain.append(node)
        if calls(node, aten.slice):
            return chain if _drops_last(node) and _in_order(chain) else None
        casts = calls(node, aten.to) and node.target is aten.to.dtype
        if not (casts or calls(node, *_FLATTENING, aten.linear)):
            return None
        node = node.args[0]
    return None


def _drops_last(node: fx.Node) -> bool:
    given = arguments(node)
    source = given["self"]
    before, after = shape(source), shape(node)
    if len(before) != _BATCHED or given["dim"] % _BATCHED != 1 or given["step"] != 1 or given["start"] not in (None, 0):
        return False
    return _size(after[1]) == _size(before[1]) - 1


def _in_order(chain: list[fx.Node]) -> bool:
    """Whether every link keeps the features last and the positions, flattened or not, before them."""
    batch, length, _ = shape(chain[-1])
    rows = _size(as_size(batch) * as_size(length))
    for link in chain:
        sizes = [_size(n) for n in shape(link)]
        if sizes[:-1] not in ([rows], [_size(batch), _size(length)]):
            return False
        source = link.args[0]
        if calls(link, *_FLATTENING) and sizes[-1] != _size(shape(source)[-1]):  # type: ignore[arg-type]
            return False
    return True


def _size_argument(graph: fx.Graph, like: fx.Node, size: Any) -> int | fx.Node:
    """A size as an argument: a number, or a node that holds it.

    It comes from the inputs if it can, so that labels do not depend on what the model computes.
    """
    if _size(size).is_Integer:
        return int(_size(size))
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    for node in nodes:
        if isinstance(node.meta["val"], torch.SymInt) and _size(node.meta["val"]) == _size(size):
            return node
    for node in (*nodes, *graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for dim, n in enumerate(value.shape):
                if _size(n) == _size(size):
                    return emit(graph, like, aten.sym_size.int, node, dim)
    raise AssertionError(f"no tensor of the graph has the size {size}")


def _size(n: Any) -> sympy.Expr:
    """Sizes are equal if these are, whatever way they were computed."""
    return sympy.expand(as_size(n))
