"""The truth table of a mask: which conditions it depends on, and what it does for every combination of them.

A *variable* is something that the mask's value depends on: a boolean leaf, an integer that is compared with constants (its
classes are the intervals between them), a numeric leaf used in arithmetic (presumed to hold one of two values), or a flag "any
key …".  Evaluating the mask's expression on the grid of all classes, with real torch arithmetic, is its truth table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .algebra import Builder
from .errors import NotProven
from .expr import Expr, is_integer, text
from .lower import Lowering, run

__all__ = ["Variable", "build_predicate", "evaluate", "find_variables", "is_document", "table_lowering"]

MAX_ROWS = 4096
_KEEP_OR_HIDE = (0, 1)  # a mask to compute with
_BIAS = (0.0, -math.inf)  # a mask to add
_POSITIONS = frozenset({"index", "sym", "times", "floordiv", "mod"})
Interval = tuple[int | None, int | None]


@dataclass(frozen=True)
class Variable:
    """One axis of the table.

    Attributes:
        expr: the expression whose value the variable gives.
        kind: "bool", "int" (classes are intervals), "value" (classes are assumed values) or "any".
        values: one representative value of each class.
        intervals: for "int", the integers of each class, both ends included, None where unbounded.
    """

    expr: Expr
    kind: str
    values: tuple[Any, ...]
    intervals: tuple[Interval, ...] = ()

    @property
    def text(self) -> str:
        return text(self.expr)


# ---------------------------------------------------------------------------------------------------------- collecting


class _Collector:
    """Walks an expression and notes what its value depends on."""

    def __init__(self, b: Builder, numeric: frozenset[Expr]) -> None:
        self.b = b
        self.numeric = numeric  # loads that are used in arithmetic somewhere
        self.bools: dict[Expr, None] = {}
        self.flags: dict[Expr, None] = {}
        self.cuts: dict[Expr, set[int]] = {}
        self.loads: dict[Expr, None] = {}
        self.scaled: set[Expr] = set()  # loads that are multiplied, subtracted or negated
        self._seen: set[Expr] = set()

    def visit(self, e: Expr) -> None:
        if e in self._seen:
            return
        self._seen.add(e)
        if e.op == "const":
            return
        if e.op == "any":
            self.flags[e] = None
            self.visit(e.args[1])
        elif e.op == "load":
            (self.bools if e.dtype is torch.bool else self.loads)[e] = None
        elif e.op in ("int_le", "int_eq") and not self._by_value(e):
            bound = e.args[1].payload
            self.cuts.setdefault(e.args[0], set()).update({bound + 1} if e.op == "int_le" else {bound, bound + 1})
        elif e.op in ("lt", "le", "eq") and not self._by_value(e):
            self.bools[e] = None
        elif e.op in _POSITIONS:
            raise NotProven(f"the mask adds a bias that depends on the position (`{text(e)}`)")
        else:
            if e.op in ("mul", "sub", "div", "neg", "log", "linear"):
                self.scaled.update(_arithmetic_parts(e))
            for a in e.args:
                self.visit(a)

    def _by_value(self, e: Expr) -> bool:
        """Whether to compute the comparison's operands, rather than to take its outcome as a variable."""
        found = _arithmetic_parts(e)
        if any(p.op in _POSITIONS for p in found):
            return False
        loads = {p for p in found if p.dtype is not torch.bool}
        if loads <= self.numeric:
            return True
        if any({"q", "k"} <= p.free for p in loads):
            return False
        return {"q", "k"} <= e.free and not is_document(e.args[0])


def _arithmetic_parts(e: Expr) -> set[Expr]:
    """The leaves of an arithmetic expression, not looking into conditions or indices."""
    found: set[Expr] = set()
    seen = {e}
    pending = list(e.args)
    while pending:
        a = pending.pop()
        if a.op in _POSITIONS or a.op == "load":
            found.add(a)
        elif a.dtype is not torch.bool and a not in seen:
            seen.add(a)
            pending.extend(a.args)
    return found


def is_document(x: Expr) -> bool:
    """``x`` is ``segment[.., q] - segment[.., k]``: zero where query and key belong to the same document."""
    if x.op != "linear" or sorted(x.payload[0]) != [-1, 1] or any(t.op != "load" for t in x.args):
        return False
    one, two = x.args
    swap = {"q": "k", "k": "q"}
    mirrored = [
        (i.op == "index" and j.op == "index" and swap.get(i.payload, i.payload) == j.payload) or i is j
        for i, j in zip(one.args, two.args, strict=True)
    ]
    return one.payload is two.payload and all(mirrored)


def find_variables(b: Builder, exprs: Sequence[Expr]) -> Iterator[tuple[Variable, ...]]:
    """The variables of a mask; several alternatives where a leaf may be presumed to hold one of several pairs of values."""
    numeric: frozenset[Expr] = frozenset()
    while True:
        collector = _Collector(b, numeric)
        for e in exprs:
            collector.visit(e)
        found = frozenset(collector.loads)
        if found <= numeric:
            break
        numeric |= found
    fixed = [Variable(e, "bool", (False, True)) for e in collector.bools]
    fixed += [Variable(e, "any", (False, True)) for e in collector.flags]
    fixed += [_integer_variable(b, x, cuts) for x, cuts in collector.cuts.items()]
    assumed = [[Variable(e, "value", values) for values in _assumed(e, e in collector.scaled)] for e in collector.loads]
    for choice in itertools.product(*assumed):
        variables = tuple(sorted([*fixed, *choice], key=lambda v: (v.kind == "any", v.text)))
        if math.prod(len(v.values) for v in variables) > MAX_ROWS:
            raise NotProven(f"the mask combines too many conditions ({len(variables)}) to be decided")
        yield variables


def _assumed(load: Expr, scaled: bool) -> list[tuple[float, ...]]:
    """The pairs of values that a numeric mask may be presumed to hold, the likelier first."""
    if is_integer(load.dtype):
        return [_KEEP_OR_HIDE]
    return [_KEEP_OR_HIDE, _BIAS] if scaled else [_BIAS, _KEEP_OR_HIDE]


def _integer_variable(b: Builder, x: Expr, cuts: set[int]) -> Variable:
    """The classes of an integer between the constants it is compared with, without those it cannot reach."""
    low, high = (_number(b.extreme(x, upper=upper)) for upper in (False, True))
    starts = sorted(cuts)
    intervals: list[Interval] = []
    for start, after in itertools.pairwise([None, *starts, None]):
        first, last = start, None if after is None else after - 1
        if (last is not None and low is not None and last < low) or (first is not None and high is not None and first > high):
            continue
        intervals.append((first, last))
    # The outermost classes reach as far as the integer does.
    intervals[0], intervals[-1] = (None, intervals[0][1]), (intervals[-1][0], None)
    values = tuple(first if first is not None else last if last is not None else 0 for first, last in intervals)
    return Variable(x, "int", values, tuple(intervals))


def _number(e: Expr | None) -> int | None:
    return int(e.payload) if e is not None and e.is_const else None


# ---------------------------------------------------------------------------------------------------------- evaluating


def table_lowering(variables: Sequence[Variable]) -> Lowering:
    """A lowering that computes expressions on the grid of all classes, one dimension per variable and one of size 1."""
    rank = len(variables) + 1
    known: dict[Expr, Any] = {}
    for axis, v in enumerate(variables):
        shape = [1] * rank
        shape[axis] = len(v.values)
        dtype = torch.int64 if v.kind == "int" else v.expr.dtype
        known[v.expr] = torch.tensor(v.values, dtype=dtype, device="cpu").reshape(shape)
    return Lowering(run, _no_leaf, {}, _no_leaf, torch.device("cpu"), known)


def _no_leaf(x: Any) -> Any:
    raise NotProven(f"`{x}` is not a condition that can be decided")


def evaluate(lowering: Lowering, e: Expr, rank: int) -> torch.Tensor:
    """The values of ``e`` on the grid, as a tensor that broadcasts against it."""
    value = lowering.tensor(e)
    return value.reshape([1] * rank) if value.dim() == 0 else value


# ---------------------------------------------------------------------------------------------------------- predicates


def build_predicate(b: Builder, variables: Sequence[Variable], table: torch.Tensor) -> Expr:
    """The canonical expression of a boolean function of the variables, given as a table with one dimension for each.

    A decision diagram over the variables in a fixed order: the same function always gives the same expression.
    """
    if not variables:
        return b.const(bool(table), torch.bool)
    groups: dict[tuple[bool, ...], list[int]] = {}
    for i in range(len(variables[0].values)):
        groups.setdefault(tuple(table[i].flatten().tolist()), []).append(i)
    branches = [(classes, build_predicate(b, variables[1:], table[classes[0]])) for classes in groups.values()]
    if len(branches) == 1:
        return branches[0][1]
    hit = next((literal(b, variables[0], classes) for classes, e in branches if e.is_const and e.payload), None)
    others = [(classes, e) for classes, e in branches if not e.is_const]
    if hit is not None and len(branches) == 2 and others:
        return b.or_(hit, others[0][1])  # where the variable does not decide, it need not be asked
    result = hit if hit is not None else b.false()
    for classes, e in others:
        result = b.or_(result, b.and_(literal(b, variables[0], classes), e))
    return result


def literal(b: Builder, v: Variable, classes: Sequence[int]) -> Expr:
    """The condition that the variable is in one of the classes (some, not all)."""
    if v.kind == "value":
        is_zero = b.compare("eq", v.expr, b.integer(0) if is_integer(v.expr.dtype) else b.const(0.0))
        return is_zero if v.values[classes[0]] == 0 else b.not_(is_zero)
    if v.kind != "int":
        return v.expr if v.values[classes[0]] else b.not_(v.expr)
    inside, outside = (_union(v, c) for c in (classes, [i for i in range(len(v.values)) if i not in classes]))
    if len(outside) < len(inside):
        return b.not_(_in_intervals(b, v.expr, outside))
    return _in_intervals(b, v.expr, inside)


def _union(v: Variable, classes: Sequence[int]) -> list[Interval]:
    """The classes as few intervals."""
    merged: list[Interval] = []
    previous = None
    for i in sorted(classes):
        first, last = v.intervals[i]
        if merged and previous == i - 1:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
        previous = i
    return merged


def _in_intervals(b: Builder, x: Expr, intervals: Sequence[Interval]) -> Expr:
    result = b.false()
    for first, last in intervals:
        if first is not None and first == last:
            inside = b.compare("eq", x, b.integer(first))
        else:
            inside = b.true() if first is None else b.compare("ge", x, b.integer(first))
            inside = inside if last is None else b.and_(inside, b.compare("le", x, b.integer(last)))
        result = b.or_(result, inside)
    return result
