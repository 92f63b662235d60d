"""The maker of index expressions: every constructor simplifies, so that what is equal by plain algebra is the same object.

Integers are kept as linear forms and compared on one side with a canonical sign: ``q >= k``, ``k - q <= 0``, ``k < q + 1`` are
one expression.  Sizes bound the index variables, so ``k < S`` folds to True.  Integer arithmetic of 32 and 64 bits is presumed
not to overflow; everything narrower, and all floating point, keeps its real dtype and is left to real arithmetic.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import TypeAlias

import sympy
import torch
from torch import fx

from .expr import Expr, intern_expr, is_integer, text

__all__ = ["Builder", "Size", "size_of"]

Size: TypeAlias = "int | torch.SymInt | sympy.Expr"
Terms: TypeAlias = dict[Expr, int]

_RANK = {"k": 0, "q": 1, "b": 2, "h": 3}
_SMALL_EXACT = 128  # integers up to here, and their neighbours, are exact in every floating dtype
_MAX_SPLITS = 2000  # each split may double the work
_WIDE = (torch.int32, torch.int64)


def size_of(size: Size) -> sympy.Expr:
    """A size as a sympy expression; sizes are equal when their expressions are."""
    if isinstance(size, torch.SymInt):
        return sympy.expand(size.node.expr)
    return sympy.expand(sympy.sympify(size))


def _order(term: Expr) -> tuple[int, str]:
    if term.op == "index":
        return _RANK.get(term.payload, 4), term.payload
    return (6 if term.op == "sym" else 5), text(term)


class Builder:
    """Makes expressions over index variables of known sizes.

    ``sizes`` maps an index variable to its exclusive upper bound; every index is at least 0.
    """

    def __init__(self, sizes: Mapping[str, Size]) -> None:
        self.sizes: dict[str, sympy.Expr] = {name: size_of(s) for name, s in sizes.items()}
        self._splits = 0

    # ------------------------------------------------------------------------------------------------------- leaves

    def const(self, value: bool | int | float, dtype: torch.dtype | None = None) -> Expr:
        """A number; with ``dtype``, rounded to it (OverflowError or RuntimeError where torch refuses)."""
        if dtype is torch.bool:
            value = bool(value)
        elif is_integer(dtype):
            value = int(value)
        elif dtype is not None:
            value = torch.full((), value, dtype=dtype, device="cpu").item()
        return intern_expr("const", payload=value, dtype=dtype)

    def true(self) -> Expr:
        return self.const(True, torch.bool)

    def false(self) -> Expr:
        return self.const(False, torch.bool)

    def integer(self, value: int) -> Expr:
        return intern_expr("const", payload=value, dtype=torch.int64)

    def index(self, name: str) -> Expr:
        """The index variable, or 0 where its dimension has one element."""
        if self.sizes[name] == 1:
            return self.integer(0)
        return intern_expr("index", payload=name, dtype=torch.int64)

    def size(self, size: Size) -> Expr:
        """A size, which may only be known at run time, as an integer expression."""
        terms: Terms = {}
        const = 0
        for monomial, coef in size_of(size).as_coefficients_dict().items():
            if not coef.is_Integer:
                return intern_expr("sym", payload=size_of(size), dtype=torch.int64)
            if monomial == 1:
                const = int(coef)
            else:
                terms[intern_expr("sym", payload=monomial, dtype=torch.int64)] = int(coef)
        return self._linear(terms, const)

    def load(self, node: fx.Node, idx: tuple[Expr, ...], dtype: torch.dtype) -> Expr:
        return intern_expr("load", idx, node, dtype)

    # ----------------------------------------------------------------------------------------------------- integers

    def terms(self, e: Expr) -> tuple[Terms, int]:
        """An integer expression as coefficients of its terms, and a constant."""
        if e.is_const:
            return {}, int(e.payload)
        if e.op == "linear":
            return dict(zip(e.args, e.payload[0], strict=True)), e.payload[1]
        return {e: 1}, 0

    def _linear(self, terms: Terms, const: int) -> Expr:
        kept = sorted(((t, c) for t, c in terms.items() if c), key=lambda item: _order(item[0]))
        if not kept:
            return self.integer(const)
        if len(kept) == 1 and kept[0][1] == 1 and const == 0:
            return kept[0][0]
        return intern_expr("linear", tuple(t for t, _ in kept), (tuple(c for _, c in kept), const), torch.int64)

    def add(self, a: Expr, b: Expr, sign: int = 1) -> Expr:
        """``a + sign * b`` of integers."""
        terms, const = self.terms(a)
        other, other_const = self.terms(b)
        for t, c in other.items():
            terms[t] = terms.get(t, 0) + sign * c
        return self._linear(terms, const + sign * other_const)

    def sub(self, a: Expr, b: Expr) -> Expr:
        return self.add(a, b, -1)

    def scale(self, e: Expr, factor: int) -> Expr:
        terms, const = self.terms(e)
        return self._linear({t: c * factor for t, c in terms.items()}, const * factor)

    def times(self, a: Expr, b: Expr) -> Expr:
        """``a * b`` of integers: linear where one is constant, a multiple of a size where one is a size."""
        if a.is_const:
            a, b = b, a
        if b.is_const:
            return self.scale(a, int(b.payload))
        if self._is_size(a):
            a, b = b, a
        if not self._is_size(b):
            return intern_expr("mul", (a, b), None, torch.int64)
        total = self.integer(0)
        for t, c in self._with_one(self.terms(a)):
            for u, d in self._with_one(self.terms(b)):
                total = self.add(total, self._product(t, u), c * d)
        return total

    @staticmethod
    def _with_one(parts: tuple[Terms, int]) -> list[tuple[Expr | None, int]]:
        terms, const = parts
        return [*terms.items(), *([(None, const)] if const else [])]

    def _product(self, t: Expr | None, u: Expr | None) -> Expr:
        """``t * u`` where ``u`` is a size, and None stands for 1."""
        if t is None or u is None:
            return (t or u) or self.integer(1)
        if t.op == "sym":
            return self.size(t.payload * u.payload)
        if t.op == "times":
            return self._times(t.args[0], t.args[1].payload * u.payload)
        return self._times(t, u.payload)

    def _times(self, t: Expr, monomial: sympy.Expr) -> Expr:
        return intern_expr("times", (t, intern_expr("sym", payload=monomial, dtype=torch.int64)), None, torch.int64)

    def _is_size(self, e: Expr) -> bool:
        return all(t.op == "sym" for t in self.terms(e)[0])

    def divmod(self, e: Expr, n: Expr) -> tuple[Expr, Expr]:
        """``(e // n, e % n)`` for a positive size ``n``; the folding of ``b * H + h`` is undone."""
        quotient, rest = self.integer(0), self.integer(0)
        divisor = self._as_sympy(n)
        for t, c in self._with_one(self.terms(e)):
            if t is None:
                low = c % int(n.payload) if n.is_const else c
                quotient = self.add(quotient, self.integer((c - low) // int(n.payload) if n.is_const else 0))
                rest = self.add(rest, self.integer(low))
                continue
            factor = t.payload if t.op == "sym" else t.args[1].payload if t.op == "times" else sympy.Integer(1)
            ratio = sympy.cancel(c * factor / divisor)
            if sympy.denom(ratio) != 1:
                rest = self.add(rest, t, c)
            elif t.op == "sym":
                quotient = self.add(quotient, self.size(ratio))
            else:
                base = t.args[0] if t.op == "times" else t
                quotient = self.add(quotient, self.times(base, self.size(ratio)))
        if self.never_above(self.scale(rest, -1), 0) and self.never_above(self.sub(rest, n), -1):
            return quotient, rest
        return (intern_expr("floordiv", (e, n), None, torch.int64), intern_expr("mod", (e, n), None, torch.int64))

    def _as_sympy(self, size: Expr) -> sympy.Expr:
        terms, const = self.terms(size)
        total = sympy.Integer(const)
        for t, c in terms.items():
            total += c * t.payload
        return total

    # ------------------------------------------------------------------------------------------------------- bounds

    def never_above(self, e: Expr, bound: int) -> bool:
        """Whether ``e <= bound`` for every position, whatever the tensors hold."""
        top = self.extreme(e, upper=True)
        if top is None:
            return False
        terms, const = self.terms(top)
        # Sizes are not negative.
        return const <= bound and all(t.op == "sym" and c <= 0 for t, c in terms.items())

    def extreme(self, e: Expr, *, upper: bool) -> Expr | None:
        """The largest (or smallest) value of ``e`` over all positions, as a linear form of sizes; None if unbounded."""
        terms, const = self.terms(e)
        total = self.integer(const)
        for t, c in terms.items():
            edge = self._term_extreme(t, upper=upper == (c > 0))
            if edge is None:
                return None
            total = self.add(total, edge, c)
        return total

    def _term_extreme(self, t: Expr, *, upper: bool) -> Expr | None:
        if t.op == "index":
            return self.size(self.sizes[t.payload] - 1) if upper else self.integer(0)
        if t.op == "sym":
            return t
        if t.op == "times":
            edge = self._term_extreme(t.args[0], upper=upper)
            return None if edge is None else self.times(edge, t.args[1])
        if t.op == "mod":
            return self.sub(t.args[1], self.integer(1)) if upper else self.integer(0)
        if t.op == "floordiv" and not upper and self.never_above(self.scale(t.args[0], -1), 0):
            return self.integer(0)
        if t.op == "cast" and t.args[0].dtype is torch.bool:
            return self.integer(int(upper))
        if t.dtype is torch.uint8:
            return self.integer(255 if upper else 0)
        return None

    # -------------------------------------------------------------------------------------------------- comparisons

    def compare(self, op: str, a: Expr, b: Expr) -> Expr:
        """``a op b`` with op one of lt, le, gt, ge, eq, ne; operands share a dtype, or one is a Python number."""
        if op == "ne":
            return self.not_(self.compare("eq", a, b))
        if op in ("gt", "ge"):
            return self.compare("lt" if op == "gt" else "le", b, a)
        if a.dtype is torch.bool and b.dtype is torch.bool and op == "eq":
            return self.not_(self.xor(a, b))
        a, b = (self.cast(x, torch.int64) if x.dtype is torch.bool else x for x in (a, b))
        if self._integral(a) and self._integral(b):
            if op == "eq":
                return self._int_eq(self.sub(a, b))
            return self._int_le(self.sub(a, b), -1 if op == "lt" else 0)
        a, b = (self.const(float(x.payload)) if x.is_const else x for x in (a, b))
        return self._unrounded(op, a, b) or self._floating(op, a, b)

    def _floating(self, op: str, a: Expr, b: Expr) -> Expr:
        if a.is_const and b.is_const:
            compare = {"lt": operator.lt, "le": operator.le, "eq": operator.eq}[op]
            return self.const(compare(a.payload, b.payload), torch.bool)
        if op == "eq" and a.is_const:
            a, b = b, a
        return intern_expr(op, (a, b), None, torch.bool)

    @staticmethod
    def _integral(e: Expr) -> bool:
        return is_integer(e.dtype) or (e.is_const and e.dtype is None and not isinstance(e.payload, float))

    def _unrounded(self, op: str, a: Expr, b: Expr) -> Expr | None:
        """Compare an integer that was cast to floating point with a small number as integers: rounding is monotone and
        exact around it."""
        for x, c, flipped in ((a, b, False), (b, a, True)):
            inner = x.args[0] if x.op == "cast" and x.dtype is not None and x.dtype.is_floating_point else None
            inner = self.cast(inner, torch.int64) if inner is not None and inner.dtype is torch.bool else inner
            if inner is None or not is_integer(inner.dtype) or not c.is_const or not abs(c.payload) <= _SMALL_EXACT:
                continue
            value = c.payload
            if op == "eq":
                return self._int_eq(self.sub(inner, self.integer(int(value)))) if value == int(value) else self.false()
            if flipped:  # value op inner
                low = math.floor(value) + 1 if op == "lt" else math.ceil(value)
                return self.not_(self._int_le(inner, low - 1))
            return self._int_le(inner, math.ceil(value) - 1 if op == "lt" else math.floor(value))
        return None

    def _int_le(self, e: Expr, bound: int) -> Expr:
        """``e <= bound`` in canonical form."""
        if (split := self._split(e)) is not None:
            rest, term, sign = split
            return self._le_of_term(rest, term, sign, bound)
        terms, const = self.terms(e)
        bound -= const
        if not terms:
            return self.const(bound >= 0, torch.bool)
        x, factor = self._oriented(terms)
        if self.never_above(self.scale(x, 1 if factor > 0 else -1), bound // abs(factor)):
            return self.true()
        if self.never_above(self.scale(x, -1 if factor > 0 else 1), -(bound // abs(factor)) - 1):
            return self.false()
        if factor > 0:
            return self._bool_le(x, bound // factor)
        return self.not_(self._bool_le(x, -(bound // -factor) - 1))

    def _bool_le(self, x: Expr, bound: int) -> Expr:
        if x.op == "cast" and x.args[0].dtype is torch.bool:
            return self.not_(x.args[0]) if bound == 0 else self.const(bound > 0, torch.bool)
        return intern_expr("int_le", (x, self.integer(bound)), None, torch.bool)

    def _int_eq(self, e: Expr) -> Expr:
        """``e == 0`` in canonical form."""
        if self._split(e) is not None:
            return self.and_(self._int_le(e, 0), self.not_(self._int_le(e, -1)))
        terms, const = self.terms(e)
        if not terms:
            return self.const(const == 0, torch.bool)
        x, factor = self._oriented(terms)
        if const % factor:
            return self.false()
        value = -const // factor
        if self.never_above(x, value - 1) or self.never_above(self.scale(x, -1), -value - 1):
            return self.false()
        if x.op == "cast" and x.args[0].dtype is torch.bool:
            return x.args[0] if value == 1 else self.not_(x.args[0])
        return intern_expr("int_eq", (x, self.integer(value)), None, torch.bool)

    def _oriented(self, terms: Terms) -> tuple[Expr, int]:
        """The terms as ``factor * x``, with ``x`` free of common factors and its first coefficient positive."""
        factor = math.gcd(*terms.values())
        x = self._linear({t: c // factor for t, c in terms.items()}, 0)
        first = x.payload[0][0] if x.op == "linear" else 1
        return (x, factor) if first > 0 else (self.scale(x, -1), -factor)

    def _split(self, e: Expr) -> tuple[Expr, Expr, int] | None:
        """``e`` as ``rest + sign * term`` with a term that comparing can be distributed over (abs, max, min, where)."""
        terms, const = self.terms(e)
        for t, c in terms.items():
            if t.op in ("abs", "max", "min", "where") and abs(c) == 1 and is_integer(t.dtype) and self._splits < _MAX_SPLITS:
                self._splits += 1
                return self._linear({u: d for u, d in terms.items() if u is not t}, const), t, c
        return None

    def _le_of_term(self, rest: Expr, term: Expr, sign: int, bound: int) -> Expr:
        if term.op == "abs":
            parts, both = [term.args[0], self.scale(term.args[0], -1)], sign > 0
        else:
            parts, both = list(term.args), (term.op == "max") == (sign > 0)
        if term.op == "where":
            yes, no = (self._int_le(self.add(rest, p, sign), bound) for p in parts[1:])
            return self.where(parts[0], yes, no, torch.bool)
        sides = [self._int_le(self.add(rest, p, sign), bound) for p in parts]
        return self.and_(*sides) if both else self.or_(*sides)

    # ----------------------------------------------------------------------------------------------------- booleans

    def not_(self, a: Expr) -> Expr:
        if a.is_const:
            return self.const(not a.payload, torch.bool)
        return a.args[0] if a.op == "not" else intern_expr("not", (a,), None, torch.bool)

    def and_(self, a: Expr, b: Expr) -> Expr:
        if a.is_const or b.is_const:
            constant, other = (a, b) if a.is_const else (b, a)
            return other if constant.payload else self.false()
        if a is b:
            return a
        if a is self.not_(b):
            return self.false()
        return intern_expr("and", (a, b), None, torch.bool)

    def or_(self, a: Expr, b: Expr) -> Expr:
        return self.not_(self.and_(self.not_(a), self.not_(b))) if a.is_const or b.is_const or a is b else self._or(a, b)

    def _or(self, a: Expr, b: Expr) -> Expr:
        return self.true() if a is self.not_(b) else intern_expr("or", (a, b), None, torch.bool)

    def xor(self, a: Expr, b: Expr) -> Expr:
        if a.is_const or b.is_const:
            constant, other = (a, b) if a.is_const else (b, a)
            return self.not_(other) if constant.payload else other
        return self.false() if a is b else intern_expr("xor", (a, b), None, torch.bool)

    # ------------------------------------------------------------------------------------------------------ the rest

    def where(self, condition: Expr, a: Expr, b: Expr, dtype: torch.dtype) -> Expr:
        """``a if condition else b``; both already have ``dtype``, or are integers."""
        if condition.is_const:
            return a if condition.payload else b
        if a is b:
            return a
        if dtype is torch.bool and (a.is_const or b.is_const):
            if a.is_const:
                return self.or_(condition, b) if a.payload else self.and_(self.not_(condition), b)
            return self.or_(self.not_(condition), a) if b.payload else self.and_(condition, a)
        return intern_expr("where", (condition, a, b), None, dtype)

    def cast(self, e: Expr, dtype: torch.dtype) -> Expr:
        """``e`` in another dtype, with the rounding that torch applies; Python numbers take the dtype."""
        if e.dtype is dtype or (e.dtype in _WIDE and dtype in _WIDE and self._fits(e, dtype)):
            return e
        if e.is_const and e.dtype is not None:
            # Converting overflows to infinity; a Python number that does not fit is an error.
            e = self.const(torch.full((), e.payload, dtype=e.dtype, device="cpu").to(dtype).item())
        if e.is_const:
            return self.const(e.payload, dtype)
        if dtype is torch.bool:
            zero = self.integer(0) if is_integer(e.dtype) else self.const(0.0)
            return self.compare("ne", e, zero)
        return intern_expr("cast", (e,), None, dtype)

    def _fits(self, e: Expr, dtype: torch.dtype) -> bool:
        """Positions fit 32 bits; a tensor's 64-bit values need not."""
        if dtype is torch.int64 or e.op in ("index", "cast", "const", "sym"):
            return True
        if e.op == "load":
            return e.dtype is not torch.int64
        return all(self._fits(a, dtype) for a in e.args if is_integer(a.dtype))

    def arith(self, op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr:
        """``op`` in the arithmetic of ``dtype``; Python numbers stay what they are."""
        if dtype in _WIDE:
            args = tuple(self.cast(a, torch.int64) for a in args)
            if op in ("add", "sub"):
                return self.add(args[0], args[1], 1 if op == "add" else -1)
            if op == "neg":
                return self.scale(args[0], -1)
            if op == "mul":
                return self.times(*args)
        typed = tuple(self.cast(a, dtype) if a.dtype is not None else a for a in args)
        if all(a.is_const for a in typed):
            from .lower import fold  # evaluation knows the torch operators; expressions do not

            return self.const(fold(op, typed, dtype), dtype)
        return intern_expr(op, typed, None, dtype)

    def any_over(self, name: str, body: Expr, body_at_key: Expr) -> Expr:
        """Whether any key has ``body``, in which the index variable ``name`` runs over the keys."""
        if name not in body.free:
            return body
        return intern_expr("any", (body, body_at_key), name, torch.bool)
