"""The value that a mask takes at padded positions: `mask` is 0 there, `1 - mask` is 1, `mask == 0` is True.

A node is interpreted as an index expression (`patterns.masks`), and the domain's predicate is assumed to be false in it. What
becomes a constant under that assumption is that constant in every padded row, whatever the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from .domain import Domain, layout_of
from .masks.algebra import Builder
from .masks.expr import Expr
from .masks.interpret import Interpreter
from .oprules import Typing, is_tensor

Number = int | float | bool
_REST_NAMES = ("h", "q")


class MaskValues:
    """Answers, for one domain, what a node holds at padded positions; None if that is not one constant."""

    def __init__(self, table: Mapping[fx.Node, Typing], domain: Domain, opaque: frozenset[fx.Node]) -> None:
        self._table = table
        self._domain = domain
        self._opaque = opaque
        self._pinned = {truth: _pinned(domain.predicate.expr, truth) for truth in (True, False)}

    def __call__(self, node: fx.Node) -> Number | None:
        return self._assuming(False, node)

    def at_valid(self, node: fx.Node) -> Number | None:
        """What ``node`` holds at valid positions, None if that is not one constant."""
        return self._assuming(True, node)

    def _assuming(self, truth: bool, node: fx.Node) -> Number | None:
        if not is_tensor(node):
            return None
        element = self._element(node)
        if element is None:
            return None
        builder, expression = element
        value = _Assume(builder, self._pinned[truth])(expression)
        return value.payload if value.is_const else None

    def _element(self, node: fx.Node) -> tuple[Builder, Expr] | None:
        """The expression of ``node`` at position k of batch row b, and any place in its other dimensions."""
        layout = layout_of(self._table[node].dims, self._domain)
        if layout is None:
            return None
        shape = node.meta["val"].shape
        sizes = {"b": self._domain.batch_size, "k": self._domain.length, "h": 1, "q": 1}
        names = list(_REST_NAMES)
        slots: list[str | None] = []
        start = 0
        for dim, runs in enumerate(layout.runs_per_dim):
            kinds = "".join(kind for kind, _ in layout.order[start : start + runs])
            start += runs
            if kinds == "r":
                if isinstance(shape[dim], int) and shape[dim] == 1:
                    slots.append(None)
                    continue
                if not names:
                    return None
                slots.append(names.pop(0))
                sizes[slots[-1]] = shape[dim]  # type: ignore[index]
            elif kinds in ("b", "s", "bs"):
                slots.append({"b": "b", "s": "k", "bs": "bk"}[kinds])
            else:
                return None
        builder = Builder(sizes)
        index = tuple(self._index(builder, slot) for slot in slots)
        return builder, Interpreter(builder, self._opaque).at(node, index)

    def _index(self, builder: Builder, slot: str | None) -> Expr:
        if slot is None:
            return builder.integer(0)
        if slot == "bk":
            return builder.add(builder.times(builder.index("b"), builder.size(self._domain.length)), builder.index("k"))
        return builder.index(slot)


def _pinned(predicate: Expr, truth: bool) -> dict[Expr, Number]:
    """Expressions whose value follows from the predicate being true, or false."""
    pinned: dict[Expr, Number] = {predicate: truth}
    if predicate.op == "not":
        pinned |= _pinned(predicate.args[0], not truth)
    elif truth and predicate.op in ("int_eq", "eq") and predicate.args[1].is_const:
        pinned[predicate.args[0]] = predicate.args[1].payload
    elif predicate.op == ("and" if truth else "or"):
        for part in predicate.args:
            pinned |= _pinned(part, truth)
    return pinned


class _Assume:
    """Rebuild an expression with some parts replaced by constants; the builder simplifies on the way."""

    def __init__(self, builder: Builder, pinned: Mapping[Expr, Number]) -> None:
        self._builder = builder
        self._pinned = pinned
        self._memo: dict[Expr, Expr] = {}

    def __call__(self, e: Expr) -> Expr:
        if e not in self._memo:
            if e in self._pinned:
                self._memo[e] = self._builder.const(self._pinned[e], e.dtype)
            else:
                self._memo[e] = self._rebuilt(e)
        return self._memo[e]

    def _rebuilt(self, e: Expr) -> Expr:
        if not e.args or e.op in ("load", "floordiv", "mod", "any"):
            return e
        args = tuple(self(a) for a in e.args)
        if all(new is old for new, old in zip(args, e.args)):
            return e
        b = self._builder
        if e.op == "linear":
            coefficients, constant = e.payload
            total = b.integer(constant)
            for coefficient, term in zip(coefficients, args):
                total = b.add(total, b.scale(term, coefficient))
            return total
        makers: dict[str, Callable[[], Expr]] = {
            "not": lambda: b.not_(args[0]),
            "and": lambda: b.and_(*args),
            "or": lambda: b.or_(*args),
            "xor": lambda: b.xor(*args),
            "where": lambda: b.where(args[0], args[1], args[2], e.dtype),  # type: ignore[arg-type]
            "cast": lambda: b.cast(args[0], e.dtype),  # type: ignore[arg-type]
            "int_le": lambda: b.compare("le", *args),
            "int_eq": lambda: b.compare("eq", *args),
            "times": lambda: b.times(*args),
        }
        if e.op in ("lt", "le", "eq"):
            return b.compare(e.op, *args)
        if e.op in makers:
            return makers[e.op]()
        return b.arith(e.op, args, e.dtype)  # type: ignore[arg-type]
