"""Attention written out: product, scale, mask, softmax, dropout, product.

    before                                               candidate
    %kt = aten.transpose.int(%k, -1, -2)                 decomposed %y = attention(%q, %k, %v)
    %s = aten.matmul.default(%q, %kt)                      masks: add %mask in float32
    %s = aten.div.Tensor(%s, 8.0)                          scale: 0.125, dropout: 0.1
    %s = aten.add.Tensor(%s, %mask)
    %w = aten.softmax.int(%s, -1)
    %w = aten.dropout.default(%w, 0.1, True)
    %y = aten.matmul.default(%w, %v)

The softmax is where the search begins: `weights` walks on to the second product, `scores` walks back to the first one.
That covers `matmul`, `bmm`, `baddbmm` and `einsum`, the scale on queries, keys or scores, a soft cap by `tanh`, masks by `add`,
`masked_fill` and `where` in any order, a softmax in float32, (B, H, S, D) and folded (B * H, S, D), and so HF's "eager"
attention and `nn.MultiheadAttention(need_weights=True)`.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..emit import emit
from ..literals import number_of
from ..masks import ScoreLayout
from ..nodes import arguments, aten, calls, same_size, shape, tensor
from . import gqa
from .candidate import Candidate, Facts, NotAttention
from .heads import check_batch, folded_sizes
from .interior import interior_of
from .scores import Scores, comes_from_product, trace
from .weights import Weights, follow

ANCHORS = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default)


def match(node: fx.Node, facts: Facts) -> Candidate | None:
    """The attention around a softmax, None if it is another softmax (over classes, over experts, to pool).

    Raises:
        NotAttention: it has both products, but something else besides.
    """
    value = tensor(node)
    rank = 0 if value is None else value.dim()
    if node not in facts.live or rank < 3 or arguments(node)["dim"] % rank != rank - 1:
        return None
    if not comes_from_product(node.args[0]):
        return None
    weights = follow(node, facts)
    if weights is None:
        return None
    scores = trace(node.args[0])  # type: ignore[arg-type]
    _check_zeroed(weights, scores)
    return _candidate(weights, scores, facts)


def _check_zeroed(weights: Weights, scores: Scores) -> None:
    """Zeroing the weights of keys that were masked before the softmax changes nothing; of others it does."""
    masked = {op.mask for op in scores.mask_ops if op.kind == "fill"}
    if any(mask not in masked for mask in weights.zeroed):
        raise NotAttention("its weights are masked again after the softmax, by another mask")


def _candidate(weights: Weights, scores: Scores, facts: Facts) -> Candidate:
    query, query_scale, query_path = _unscaled(scores.query)
    for factor, divides in scores.factors:
        # A scale that is known only when the graph runs goes to the query: the nodes are used only if the candidate is.
        with query.graph.inserting_before(weights.product):
            query = emit(query.graph, scores.product, aten.div.Tensor if divides else aten.mul.Tensor, query, factor)
    key, key_scale, key_path = _key(scores.key_transposed)
    value = weights.value
    rank = len(shape(query))
    if rank not in (3, 4) or len(shape(key)) != rank or len(shape(value)) != rank:
        raise NotAttention(f"its query has {rank} dimensions and its value {len(shape(value))}; "
                           "(batch, heads, length, head_dim) is expected")  # fmt: skip
    side: list[fx.Node] = [*query_path, *key_path]
    kv_groups = 1
    if rank == 4:
        key, value, kv_groups, repeats = gqa.undo_repeat(query, key, value)
        side += repeats
    check_batch(query, key, value, kv_groups)
    computed, returned = scores.product.meta["val"].dtype, weights.product.meta["val"].dtype
    if computed != returned:
        raise NotAttention(f"its scores are computed in {computed} and its result in {returned}".replace("torch.", ""))
    core = [*scores.passed, *weights.passed, weights.product]
    return Candidate(
        output=weights.product,
        query=query,
        key=key,
        value=value,
        mask_ops=tuple(scores.mask_ops),
        layout=_layout(scores, weights, query, key),
        scale=scores.scale * query_scale * key_scale,
        dropout_p=weights.dropout_p,
        is_causal=False,
        spelling="decomposed",
        interior=interior_of(core, side, facts),
        kv_groups=kv_groups,
        score_dtype=next(iter(scores.dtypes)),
        softcap=scores.softcap,
    )


def _unscaled(node: fx.Node) -> tuple[fx.Node, float, list[fx.Node]]:
    """`node` before a constant factor, the factor, and the nodes that applied it."""
    scale, path = 1.0, []
    while calls(node, aten.mul, aten.div) and "rounding_mode" not in node.kwargs:
        left, right = node.args[:2]
        number = number_of(right)
        if number is None and calls(node, aten.mul):
            left, number = right, number_of(left)
        same_dtype = isinstance(left, fx.Node) and left.meta["val"].dtype == node.meta["val"].dtype
        if number is None or number == 0 or not same_dtype:
            break
        scale *= 1 / number if calls(node, aten.div) else number
        path.append(node)
        node = left  # type: ignore[assignment]
    return node, scale, path


def _key(transposed: fx.Node) -> tuple[fx.Node, float, list[fx.Node]]:
    """The key (..., S, D) from the second factor (..., D, S) of the product, its constant factor, the nodes in between."""
    node, outer, path = _unscaled(transposed)
    rank = len(shape(node))
    if calls(node, aten.transpose, aten.swapaxes, aten.swapdims):
        _, first, second = arguments(node).values()
        if {first % rank, second % rank} == {rank - 2, rank - 1}:
            key, inner, more = _unscaled(node.args[0])  # type: ignore[arg-type]
            return key, outer * inner, [*path, node, *more]
    if calls(node, aten.mT):
        key, inner, more = _unscaled(node.args[0])  # type: ignore[arg-type]
        return key, outer * inner, [*path, node, *more]
    # (B, S, H, D) permuted to (B, H, D, S) at once, or no view at all: no node of the graph is the key in our layout.
    with node.graph.inserting_after(node):
        return emit(node.graph, node, aten.transpose.int, node, -2, -1), outer, path


def _layout(scores: Scores, weights: Weights, query: fx.Node, key: fx.Node) -> ScoreLayout:
    """Where batch, head, query and key are in the scores that the masks meet."""
    shapes = scores.mask_shapes or [shape(scores.product)]
    if any(len(s) != len(shapes[0]) for s in shapes):
        raise NotAttention("its masks are applied in different layouts")
    b, h = _sizes(scores, weights, query)
    batch_dims = {4: (("b",), ("h",)), 3: (("b", "h"),)}.get(len(shapes[0]))
    q, k = shape(query)[-2], shape(key)[-2]
    if batch_dims is None or not same_size(shapes[0][-2], q) or not same_size(shapes[0][-1], k):
        raise NotAttention(f"its masks are applied in an unknown layout {list(shapes[0])}")
    return ScoreLayout(dims=(*batch_dims, ("q",), ("k",)), sizes={"b": b, "h": h, "q": q, "k": k})


def _sizes(scores: Scores, weights: Weights, query: fx.Node) -> tuple[Any, Any]:
    if len(shape(query)) == 4:
        return shape(query)[0], shape(query)[1]
    for node in (*scores.passed, *weights.passed):
        if len(shape(node)) == 4:
            return shape(node)[0], shape(node)[1]
    return folded_sizes(query)
