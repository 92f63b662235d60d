"""Grouped-query attention: key and value heads that several query heads share.

Models repeat the key and value heads before the attention; a varlen kernel reads the shared ones, so the repetition is
undone:

    before                                                        candidate
    %k5 = aten.unsqueeze.default(%k, 2)          # B Hk 1 S D     attention(%q, %k, %v), kv_groups=4
    %k5 = aten.expand.default(%k5, [b, 2, 4, s, d])
    %kr = aten.reshape.default(%k5, [b, 8, s, d])
    %y = aten.scaled_dot_product_attention.default(%q, %kr, %vr)

The same for `repeat_interleave(k, 4, dim=1)`, for one head that is expanded to all, and for `enable_gqa=True`.
`k.repeat(1, 4, 1, 1)` puts the copies in another order and is no grouped attention.
"""

from __future__ import annotations

from torch import fx

from ..nodes import arguments, aten, calls, same_size, shape

_COPIES = (aten.contiguous, aten.clone)


def undo_repeat(query: fx.Node, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node, int, tuple[fx.Node, ...]]:
    """The key and value before repetition, how many query heads share one, and the nodes that did the repeating.

    All are (B, H, S, D).  Key and value are left as they are unless both are repeated equally often.
    """
    heads = shape(query)[1]
    (new_key, through_key), (new_value, through_value) = _unrepeated(key), _unrepeated(value)
    if not same_size(shape(new_key)[1], shape(new_value)[1]):
        new_key, new_value, through_key, through_value = key, value, (), ()
    groups = _groups(heads, shape(new_key)[1])
    if groups is None:
        return key, value, _groups(heads, shape(key)[1]) or 1, ()
    return new_key, new_value, groups, through_key + through_value


def _groups(heads: object, kv_heads: object) -> int | None:
    if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads > 0 and heads % kv_heads == 0:
        return heads // kv_heads
    return 1 if same_size(heads, kv_heads) else None


def _unrepeated(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """`node` before its heads were repeated, and the nodes in between; `node` itself if they were not."""
    through: list[fx.Node] = []
    current = node
    while calls(current, *_COPIES):
        through.append(current)
        current = current.args[0]  # type: ignore[assignment]
    for undo in (_undo_expand_and_fold, _undo_repeat_interleave, _undo_expand_of_one_head):
        found = undo(current)
        if found is not None:
            source, nodes = found
            return source, (*through, *nodes)
    return node, ()


def _undo_expand_and_fold(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(B, Hk, S, D) -> unsqueeze(2) -> expand -> reshape to (B, Hk * n, S, D)."""
    if not calls(node, aten.reshape, aten.view, aten._unsafe_view, aten.flatten):
        return None
    expanded: fx.Node = node.args[0]  # type: ignore[assignment]
    through = [node]
    while calls(expanded, *_COPIES):
        through.append(expanded)
        expanded = expanded.args[0]  # type: ignore[assignment]
    if not calls(expanded, aten.expand) or len(shape(expanded)) != 5 or len(shape(node)) != 4:
        return None
    five: fx.Node = expanded.args[0]  # type: ignore[assignment]
    if not calls(five, aten.unsqueeze) or arguments(five)["dim"] % 5 != 2:
        return None
    source: fx.Node = five.args[0]  # type: ignore[assignment]
    b, kv_heads, copies, length, dim = shape(expanded)
    expected = (b, kv_heads * copies, length, dim)
    unchanged = (b, kv_heads, length, dim)
    if not all(map(same_size, shape(node), expected)) or not all(map(same_size, shape(source), unchanged)):
        return None
    return source, (*through, expanded, five)


def _undo_repeat_interleave(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    if not (isinstance(node, fx.Node) and node.target is aten.repeat_interleave.self_int):
        return None
    given = arguments(node)
    source = given["self"]
    if given["dim"] is None or len(shape(source)) != 4 or given["dim"] % 4 != 1 or not isinstance(given["repeats"], int):
        return None
    return source, (node,)


def _undo_expand_of_one_head(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(B, 1, S, D) -> expand to (B, H, S, D)."""
    if not calls(node, aten.expand):
        return None
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    if len(shape(source)) != 4 or not same_size(shape(source)[1], 1):
        return None
    (b, _, s, d), (b0, _, s0, d0) = shape(node), shape(source)
    if not (same_size(b, b0) and same_size(s, s0) and same_size(d, d0)):
        return None
    return source, (node,)
