"""The mask prover: which keys a query sees, proven from how the mask is computed.

    mask = attention_mask[:, None, None, :].bool() & (arange(S)[None, :] <= arange(S)[:, None])
    ->  attention_mask[b, k] != 0  and  k <= q       key predicate: attention_mask != 0; window (-1, 0)

The mask is interpreted as an index expression (`interpret.py`); the conditions that it depends on span a truth table
(`table.py`); what it does to a score is evaluated row by row in real arithmetic (`scores.py`); and if the rows that keep the
score are exactly a condition on the key, and one on the query, and one on their distance, that is the proof (`decide.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from varlen_inductor import _compat

from . import rules_values, rules_views  # noqa: F401  (they register the rules)
from .algebra import Builder, size_of
from .decide import decide
from .errors import NotProven
from .expr import Expr, text
from .interpret import Index, Interpreter, Unsupported, value_of, where_in_source
from .proof import MaskOp, MaskProof, ScoreLayout, Spelling
from .scores import ScoreStep

__all__ = ["prove"]

Snapshot = tuple[tuple[fx.Node, Any, Any], ...]
Memory = dict[Any, tuple[Snapshot, MaskProof | NotProven]]


def prove(
    ops: Sequence[MaskOp],
    layout: ScoreLayout,
    dtype: torch.dtype,
    *,
    is_causal: bool = False,
    spelling: Spelling,
    opaque: frozenset[fx.Node] = frozenset(),
) -> MaskProof:
    """Prove which keys each query sees.

    Args:
        ops: the steps on the scores, in the order in which they are applied; they are not changed and nothing is inserted.
        layout: how the dimensions of the scores relate to b, h, q and k.
        dtype: of the scores that the first step is applied to; for "sdpa", of the query.
        is_causal: SDPA's flag: query q sees keys k <= q, counted from the first of both.
        spelling: "sdpa", or "decomposed" into matmul, softmax, matmul; decides what becomes of a query without keys.
        opaque: nodes whose storage is written somewhere in the graph; a mask that depends on one is refused.

    Returns:
        The proof.  Without a mask, its ``key`` is None and its window unbounded.

    Raises:
        NotProven: with the reason, in words for the user.
    """
    key = (
        tuple((op.kind, op.mask, op.value) for op in ops),
        layout.dims,
        tuple((name, str(size_of(n))) for name, n in sorted(layout.sizes.items())),
        (dtype, is_causal, spelling, opaque),
    )
    proofs = _memory_of(ops[0].mask.graph) if ops else {}
    if key in proofs and all(n.args is args and n.kwargs is kwargs for n, args, kwargs in proofs[key][0]):
        result = proofs[key][1]
    else:
        snapshot, result = _prove(ops, layout, dtype, is_causal, spelling, opaque)
        proofs[key] = (snapshot, result)
    if isinstance(result, NotProven):
        raise NotProven(result.reason)
    return result


def _memory_of(graph: fx.Graph) -> Memory:
    """The proofs made about a graph.  The graph holds them: they refer to its nodes, and go with it."""
    memory: Memory = graph.__dict__.setdefault("_varlen_mask_proofs", {})
    return memory


def _prove(
    ops: Sequence[MaskOp],
    layout: ScoreLayout,
    dtype: torch.dtype,
    is_causal: bool,
    spelling: Spelling,
    opaque: frozenset[fx.Node],
) -> tuple[Snapshot, MaskProof | NotProven]:
    it = Interpreter(Builder(layout.sizes), opaque)
    result: MaskProof | NotProven
    with _compat.no_dispatch_modes(), torch.no_grad():
        try:
            steps = _steps(it, ops, layout, is_causal)
            result = decide(it, steps, dtype, spelling)
        except NotProven as refusal:
            result = refusal
        except RecursionError:
            result = NotProven("the mask is computed in too many steps to be followed")
    return tuple((n, n.args, n.kwargs) for n in it.visited), result


# ---------------------------------------------------------------------------------------------------- mask -> expression


def _steps(it: Interpreter, ops: Sequence[MaskOp], layout: ScoreLayout, is_causal: bool) -> list[ScoreStep]:
    b = it.b
    steps = [ScoreStep("bool", b.compare("le", b.index("k"), b.index("q")))] if is_causal else []
    index = tuple(_folded(b, dim) for dim in layout.dims)
    for op in ops:
        mask = _mask_at(it, op.mask, index, layout)
        kind = "where_keep" if op.kind == "where_else" else op.kind
        if kind == "mul":
            raise NotProven(f"the scores are multiplied by `{op.mask}`{where_in_source(op.mask)}: a zero score hides no key")
        if kind != "add" and mask.dtype is not torch.bool:
            raise NotProven(f"the mask `{op.mask}`{where_in_source(op.mask)} is not boolean")
        if kind == "add" and (mask.dtype is None or not mask.dtype.is_floating_point):
            mask = b.cast(mask, torch.float32)
        value = None if op.value is None else _fill(it, op)
        steps.append(ScoreStep(kind, mask, value))
    return steps


def _folded(b: Builder, dim: Sequence[str]) -> Expr:
    position = b.integer(0)
    for name in dim:
        position = b.add(b.times(position, b.size(b.sizes[name])), b.index(name))
    return position


def _mask_at(it: Interpreter, mask: fx.Node, index: Index, layout: ScoreLayout) -> Expr:
    value = value_of(mask)
    if not isinstance(value, torch.Tensor):
        raise NotProven(f"the mask `{mask}` is not a tensor")
    if value.dim() > len(index):
        raise NotProven(f"the mask has {value.dim()} dimensions and the scores have {len(index)}")
    dims = layout.dims[len(index) - value.dim() :]
    for n, dim in zip(value.shape, dims, strict=True):
        expected = size_of(1)
        for name in dim:
            expected *= size_of(layout.sizes[name])
        if not it.is_one(n) and not it.same(n, expected):
            raise NotProven(f"the mask's shape {tuple(value.shape)} does not broadcast to that of the scores")
    try:
        return it.at(mask, it.broadcast(mask, index))
    except Unsupported as error:
        raise NotProven(f"the mask `{mask}`{where_in_source(mask)} cannot be followed: {error}") from error


def _fill(it: Interpreter, op: MaskOp) -> Expr:
    try:
        value = it.arg(op.value, ())
    except Unsupported as error:
        raise NotProven(f"the value that masked scores are set to cannot be followed: {error}") from error
    if value.loads:
        raise NotProven(f"the value that masked scores are set to (`{text(value)}`) is only known at run time")
    return value
