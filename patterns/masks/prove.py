"""The mask prover: which keys a query sees, proven from how the mask is computed.

    mask = attention_mask[:, None, None, :].bool() & (arange(S)[None, :] <= arange(S)[:, None])
    ->  attention_mask[b, k] != 0  and  k <= q       key predicate: attention_mask != 0; window (-1, 0)

The mask is interpreted as an index expression (`interpret.py`); the conditions that it depends on span a truth table (`table.py`);
what it does to a score is evaluated row by row in real arithmetic (`scores.py`); and if the rows that keep the score are
exactly a condition on the key, and one on the query, and one on their distance, that is the proof.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from varlen_inductor import _compat

from . import rules_values, rules_views  # noqa: F401  (they register the rules)
from .algebra import Builder, size_of
from .errors import NotProven
from .expr import Expr, tensor_name, text
from .interpret import Index, Interpreter, Unsupported, value_of, where_in_source
from .proof import MaskOp, MaskProof, NoValidKey, ScoreLayout, Spelling
from .predicate import Obligation, Predicate
from .scores import Outcome, ScoreStep, apply_steps
from .table import Variable, build_predicate, describe_leaf, evaluate, find_variables, is_document, table_lowering

__all__ = ["prove"]

Snapshot = tuple[tuple[fx.Node, Any, Any], ...]
_PROOFS: weakref.WeakKeyDictionary[fx.Graph, dict[Any, tuple[Snapshot, MaskProof | NotProven]]] = weakref.WeakKeyDictionary()


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
    proofs = _PROOFS.setdefault(ops[0].mask.graph, {}) if ops else {}
    if key in proofs and all(n.args is args and n.kwargs is kwargs for n, args, kwargs in proofs[key][0]):
        result = proofs[key][1]
    else:
        snapshot, result = _prove(ops, layout, dtype, is_causal, spelling, opaque)
        proofs[key] = (snapshot, result)
    if isinstance(result, NotProven):
        raise NotProven(result.reason)
    return result


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
            result = _decide(it, steps, dtype, spelling)
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


# ------------------------------------------------------------------------------------------------------ table -> proof


def _decide(it: Interpreter, steps: Sequence[ScoreStep], dtype: torch.dtype, spelling: Spelling) -> MaskProof:
    exprs = [e for step in steps for e in (step.mask, step.value) if e is not None]
    _refuse_leaves(it, exprs)
    refusal: NotProven | None = None
    try:
        for variables in find_variables(it.b, exprs):
            try:
                return _Decision(it, steps, variables, dtype, spelling).proof()
            except NotProven as error:
                refusal = error
    except NotProven as error:
        refusal = error
    assert refusal is not None
    raise refusal


def _refuse_leaves(it: Interpreter, exprs: Sequence[Expr]) -> None:
    """Refuse what can be told from the leaves alone."""
    for e in _loads_of(exprs):
        node = e.payload
        if node in it.written:
            raise NotProven(f"the mask depends on `{tensor_name(node)}`{where_in_source(node)}, which is modified in place")
        if e.dtype is not None and e.dtype.is_floating_point and may_require_grad(node):
            raise NotProven(f"the mask depends on {describe_leaf(it, e)}, which is learned (it requires a gradient)")


def _loads_of(exprs: Sequence[Expr]) -> list[Expr]:
    seen: dict[Expr, None] = {}

    def walk(e: Expr) -> None:
        if e not in seen:
            seen[e] = None
            for a in e.args:
                walk(a)

    for e in exprs:
        walk(e)
    return [e for e in seen if e.op == "load"]


def may_require_grad(node: fx.Node) -> bool:
    """Whether autograd may record the node's value."""
    if "requires_grad" in node.meta:
        return bool(node.meta["requires_grad"])
    pending, seen = [node], {node}
    while pending:
        n = pending.pop()
        value = n.meta.get("example_value", n.meta.get("val"))
        if n.op in ("placeholder", "get_attr") and isinstance(value, torch.Tensor) and value.requires_grad:
            return True
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            continue
        pending += [m for m in n.all_input_nodes if m not in seen]
        seen.update(n.all_input_nodes)
    return False


class _Decision:
    """Decides one truth table."""

    def __init__(
        self,
        it: Interpreter,
        steps: Sequence[ScoreStep],
        variables: Sequence[Variable],
        dtype: torch.dtype,
        spelling: Spelling,
    ) -> None:
        self.it, self.b, self.variables, self.spelling = it, it.b, variables, spelling
        self.lowering = table_lowering(variables)
        self.shape = [*(len(v.values) for v in variables), 1]
        self.outcome: Outcome = apply_steps(steps, self.lowering, self.shape, dtype, spelling)
        # Where some key is visible, every "any key ..." that the mask asks for is true.
        self.flags = [i for i, v in enumerate(variables) if v.kind == "any"]

    def proof(self) -> MaskProof:
        self.outcome.check()
        keep = self._with_flags(self.outcome.keep)
        if not bool(keep.any()):
            raise NotProven("the mask hides every key")
        groups = self._groups(keep)
        self._check_conjunction(keep, groups)
        key, query = self._predicate(keep, groups["key"], "k"), self._predicate(keep, groups["query"], "q")
        left, right = self._window(keep, groups["position"])
        no_valid_key = self._no_valid_key()
        if key is None and query is None and self._always_a_key(left, right):
            no_valid_key = "zero"
        return MaskProof(
            key=key,
            query=query,
            window_left=left,
            window_right=right,
            document=None,
            no_valid_key=no_valid_key,
            obligations=tuple(
                dict.fromkeys(Obligation(v.expr.payload, v.values) for v in self.variables if v.kind == "value")
            ),
            assumption=self.outcome.assumption(),
            description=_describe(key, query, left, right),
        )

    # ------------------------------------------------------------------------------------------------- the conjunction

    def _with_flags(self, table: torch.Tensor) -> torch.Tensor:
        """The slice of a table (over all variables) in which every flag is true, flags kept as dimensions of size 1."""
        for axis in self.flags:
            table = table.narrow(axis, 1, 1)
        return table

    def _groups(self, keep: torch.Tensor) -> dict[str, list[int]]:
        """The variables that matter, by what they depend on."""
        groups: dict[str, list[int]] = {"key": [], "query": [], "position": []}
        for axis, v in enumerate(self.variables):
            if axis in self.flags or bool((keep == keep.narrow(axis, 0, 1)).all()):
                continue
            groups[self._kind(v)].append(axis)
        if len(groups["position"]) > 1:
            raise NotProven("more than one condition on positions: " + self._texts(groups["position"]))
        return groups

    def _kind(self, v: Variable) -> str:
        free = v.expr.free
        if "h" in free:
            raise NotProven(f"the mask differs between heads: `{v.text}`" + self._source(v))
        if not {"q", "k"} <= free:
            return "query" if "q" in free else "key"
        x = v.expr
        if x.op == "linear" and x.args == (self.b.index("k"), self.b.index("q")) and x.payload == ((1, -1), 0):
            return "position"
        if is_document(x):
            name = tensor_name(x.args[0].payload)
            raise NotProven(f"positions see each other only where `{name}` is equal (several documents in a row), which is not rewritten yet")
        pairs = next((e for e in _loads_of([x]) if {"q", "k"} <= e.free), None)
        if pairs is not None:
            raise NotProven(f"the mask is data for every pair of positions: {describe_leaf(self.it, pairs)}")
        raise NotProven(f"`{v.text}` relates query and key in a way that is neither padding, nor causal, nor a window" + self._source(v))

    def _source(self, v: Variable) -> str:
        return "; ".join(["", *(describe_leaf(self.it, e) for e in _loads_of([v.expr]))][:2]).replace("; ", ", from ", 1)

    def _texts(self, axes: Sequence[int]) -> str:
        return ", ".join(f"`{self.variables[i].text}`" for i in axes)

    def _project(self, keep: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        """For which values of these variables any row keeps the score; other dimensions get size 1."""
        others = [i for i in range(keep.dim()) if i not in axes]
        return keep.any(dim=others, keepdim=True) if others else keep

    def _check_conjunction(self, keep: torch.Tensor, groups: dict[str, list[int]]) -> None:
        product = torch.ones_like(keep)
        for axes in groups.values():
            product = product & self._project(keep, axes)
        if not torch.equal(product, keep):
            every = [i for axes in groups.values() for i in axes]
            raise NotProven(
                "conditions on key, query and position are combined otherwise than by `and`: " + self._texts(every)
            )

    def _predicate(self, keep: torch.Tensor, axes: Sequence[int], name: str) -> Predicate | None:
        if not axes:
            return None
        variables = [self.variables[i] for i in axes]
        table = self._project(keep, axes).reshape([len(v.values) for v in variables])
        if name == "k":
            return Predicate(build_predicate(self.b, variables, table), "k")
        return Predicate(self._about_keys(variables, table), "q")

    def _about_keys(self, variables: Sequence[Variable], table: torch.Tensor) -> Expr:
        """A query predicate in the same variables as key predicates, so that the two can be compared."""
        rename = _Renamer(self.b, {"q": "k"})
        renamed = [Variable(rename(v.expr), v.kind, v.values, v.intervals) for v in variables]
        order = sorted(range(len(renamed)), key=lambda i: renamed[i].text)
        return build_predicate(rename.b, [renamed[i] for i in order], table.permute(order).contiguous())

    # ------------------------------------------------------------------------------------------------------- the window

    def _window(self, keep: torch.Tensor, axes: Sequence[int]) -> tuple[int, int]:
        if not axes:
            return -1, -1
        v = self.variables[axes[0]]
        table = self._project(keep, axes).flatten().tolist()
        inside = [interval for interval, kept in zip(v.intervals, table, strict=True) if kept]
        rule = text(build_predicate(self.b, [v], torch.tensor(table)))
        first, last = inside[0][0], inside[-1][1]
        if len(inside) != max(table_index(table)) - min(table_index(table)) + 1:
            raise NotProven(f"the rule on positions (`{rule}`) is not a window")
        if (first is not None and first > 0) or (last is not None and last < 0):
            raise NotProven(f"the window (`{rule}`) does not contain the query's own position")
        return (-1 if first is None else -first), (-1 if last is None else last)

    def _always_a_key(self, left: int, right: int) -> bool:
        """Whether the window alone leaves every query a key."""
        longer = self.b.sub(self.b.size(self.b.sizes["q"]), self.b.size(self.b.sizes["k"]))
        return left == -1 or self.b.never_above(longer, 0)

    # -------------------------------------------------------------------------------------------- queries without keys

    def _no_valid_key(self) -> NoValidKey:
        keep = self.outcome.keep
        hidden = ~keep
        if not self.flags:
            return self.outcome.no_valid_key(hidden, self.spelling)
        bodies = {i: evaluate(self.lowering, self.variables[i].expr.args[1], keep.dim()).expand_as(keep) for i in self.flags}
        normal = self._with_flags(keep)
        exact = False
        for i, body in bodies.items():
            condition = self._with_flags(body)
            if bool((normal & ~condition).any()):
                raise NotProven(f"`{self.variables[i].text}` can be false for a query that sees a key")
            exact = exact or not bool((condition & ~normal).any())
        possible = torch.zeros_like(keep)
        for i, body in bodies.items():
            unset = torch.zeros_like(keep)
            unset.narrow(i, 0, 1).fill_(True)
            possible = possible | (unset & ~body)
            # A false flag means that no key has its condition, this one included.
        for i, body in bodies.items():
            falsified = torch.zeros_like(keep)
            falsified.narrow(i, 0, 1).copy_(body.narrow(i, 0, 1))
            possible = possible & ~falsified
        if not exact:
            possible = possible | self._all_flags_set(keep)
        if not bool((possible & hidden).any()) and exact:
            return "unmasked"
        if bool((possible & keep).any()):
            return "other"
        return self.outcome.no_valid_key(possible & hidden, self.spelling)

    def _all_flags_set(self, keep: torch.Tensor) -> torch.Tensor:
        """Rows that a query without keys can show although every flag is true."""
        rows = torch.zeros_like(keep)
        self._with_flags(rows).copy_(~self._with_flags(keep))
        return rows


def table_index(table: Sequence[bool]) -> list[int]:
    return [i for i, kept in enumerate(table) if kept]


class _Renamer:
    """Rewrites expressions with other index variables."""

    def __init__(self, b: Builder, names: dict[str, str]) -> None:
        sizes = {**b.sizes, **{new: b.sizes[old] for old, new in names.items()}}
        self.b, self.names, self.memo = Builder(sizes), names, {}  # type: ignore[var-annotated]

    def __call__(self, e: Expr) -> Expr:
        if e not in self.memo:
            self.memo[e] = self._rename(e)
        return self.memo[e]

    def _rename(self, e: Expr) -> Expr:
        from .expr import intern_expr

        if e.op == "index":
            return self.b.index(self.names.get(e.payload, e.payload))
        args = tuple(self(a) for a in e.args)
        if e.op == "linear":
            total = self.b.integer(e.payload[1])
            for a, c in zip(args, e.payload[0], strict=True):
                total = self.b.add(total, a, c)
            return total
        return intern_expr(e.op, args, e.payload, e.dtype)


def _describe(key: Predicate | None, query: Predicate | None, left: int, right: int) -> str:
    parts = [f"key: {key.text}"] if key is not None else []
    parts += [f"query: {query.text}"] if query is not None else []
    if (left, right) == (-1, 0):
        parts.append("causal")
    elif left != -1 or right != -1:
        low, high = (f"q - {left} <= " if left != -1 else ""), (f" <= q + {right}" if right > 0 else " <= q" if right == 0 else "")
        parts.append(f"window: {low}k{high}")
    return "; ".join(parts) or "every key is visible"
