"""The builder of index expressions: whatever it simplifies must mean the same at every index."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st

from varlen_inductor.patterns.masks.algebra import Builder
from varlen_inductor.patterns.masks.expr import Expr, text
from varlen_inductor.patterns.masks.lower import Lowering, run

SIZES = {"b": 3, "h": 2, "q": 4, "k": 5}


@dataclass
class Axis:
    position: torch.Tensor
    size: int


AXES = {name: Axis(torch.arange(n).view([-1 if d == i else 1 for i in range(4)]), n) for d, (name, n) in enumerate(SIZES.items())}


def on_grid(e: Expr) -> torch.Tensor:
    """The expression at every (b, h, q, k)."""
    return Lowering(run, _fail, AXES, _fail, torch.device("cpu")).tensor(e).expand(3, 2, 4, 5)


def _fail(x: Any) -> Any:
    raise AssertionError(x)


Pair = tuple[Callable[[Builder], Expr], Callable[[], torch.Tensor]]  # the expression, and what it must equal

INTEGERS: list[Pair] = [
    *((lambda b, n=n: b.index(n), lambda n=n: AXES[n].position) for n in SIZES),
    *((lambda b, c=c: b.integer(c), lambda c=c: torch.tensor(c)) for c in (-3, -1, 0, 1, 2, 5)),
]
BINARY = [
    (lambda b, x, y: b.add(x, y), operator.add),
    (lambda b, x, y: b.sub(x, y), operator.sub),
    (lambda b, x, y: b.arith("max", (x, y), torch.int64), torch.maximum),
    (lambda b, x, y: b.arith("min", (x, y), torch.int64), torch.minimum),
    (lambda b, x, y: b.where(b.compare("lt", x, y), b.add(x, y), y, torch.int64), lambda x, y: torch.where(x < y, x + y, y)),
]
UNARY = [
    (lambda b, x: b.scale(x, -2), lambda x: -2 * x),
    (lambda b, x: b.arith("abs", (x,), torch.int64), torch.abs),
    (lambda b, x: b.divmod(x, b.integer(3))[0], lambda x: x // 3),
    (lambda b, x: b.divmod(x, b.integer(2))[1], lambda x: x % 2),
    (lambda b, x: b.cast(b.compare("le", x, b.integer(2)), torch.int64), lambda x: (x <= 2).long()),
]


@st.composite
def integers(draw: st.DrawFn, depth: int = 3) -> Pair:
    kind = draw(st.integers(0, 2)) if depth else 0
    if kind == 0:
        return draw(st.sampled_from(INTEGERS))
    if kind == 1:
        make, real = draw(st.sampled_from(UNARY))
        inner = draw(integers(depth - 1))
        return (lambda b: make(b, inner[0](b))), (lambda: real(inner[1]()))
    make, real = draw(st.sampled_from(BINARY))
    x, y = draw(integers(depth - 1)), draw(integers(depth - 1))
    return (lambda b: make(b, x[0](b), y[0](b))), (lambda: real(x[1](), y[1]()))


COMPARE = {"lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne}


@st.composite
def conditions(draw: st.DrawFn, depth: int = 2) -> Pair:
    kind = draw(st.integers(0, 3)) if depth else 0
    op = draw(st.sampled_from(list(COMPARE)))
    if kind == 0:
        x, y = draw(integers()), draw(integers())
        return (lambda b: b.compare(op, x[0](b), y[0](b))), (lambda: COMPARE[op](x[1](), y[1]()))
    if kind == 1:
        x, c = draw(integers()), draw(st.sampled_from([-1.0, 0.0, 0.5, 2.0, 2.5, float("inf")]))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        return (
            lambda b: b.compare(op, b.cast(x[0](b), dtype), b.const(c)),
            lambda: COMPARE[op](x[1]().to(dtype), torch.tensor(c)),
        )
    x, y = draw(conditions(depth - 1)), draw(conditions(depth - 1))
    name, real = draw(
        st.sampled_from([("and_", torch.logical_and), ("or_", torch.logical_or), ("xor", torch.logical_xor), ("not_", None)])
    )
    if real is None:
        return (lambda b: b.not_(x[0](b))), (lambda: ~x[1]())
    return (lambda b: getattr(b, name)(x[0](b), y[0](b))), (lambda: real(x[1](), y[1]()))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(integers())
def test_integers(pair: Pair) -> None:
    b = Builder(SIZES)
    e = pair[0](b)
    assert torch.equal(on_grid(e), pair[1]().expand(3, 2, 4, 5)), text(e)
    for bound in (-2, 0, 3):
        if b.never_above(e, bound):
            assert int(on_grid(e).max()) <= bound


@settings(max_examples=300, deadline=None, derandomize=True)
@given(conditions())
def test_conditions(pair: Pair) -> None:
    e = pair[0](Builder(SIZES))
    assert torch.equal(on_grid(e), pair[1]().expand(3, 2, 4, 5)), text(e)


def test_spellings_are_one_expression() -> None:
    b = Builder(SIZES)
    q, k, one = b.index("q"), b.index("k"), b.integer(1)
    causal = b.compare("le", k, q)
    assert b.compare("ge", q, k) is causal
    assert b.compare("lt", k, b.add(q, one)) is causal
    assert b.compare("le", b.sub(k, q), b.integer(0)) is causal
    assert b.not_(b.compare("gt", k, q)) is causal
    assert b.compare("le", b.scale(k, 2), b.add(b.scale(q, 2), one)) is causal
    assert b.compare("lt", b.integer(0), b.integer(1)).payload is True


def test_bounds_decide() -> None:
    b = Builder({"q": sympy.Symbol("s", integer=True), "k": sympy.Symbol("s", integer=True), "b": 1})
    q, k, s = b.index("q"), b.index("k"), b.size(sympy.Symbol("s", integer=True))
    assert b.compare("ge", q, b.integer(0)) is b.true()
    assert b.compare("lt", k, s) is b.true()
    assert b.compare("ge", k, s) is b.false()
    assert b.compare("lt", b.add(k, b.integer(1)), s).op == "int_le"
    assert b.index("b") is b.integer(0)


def test_folding_is_undone() -> None:
    n, h = sympy.Symbol("n", integer=True), sympy.Symbol("h", integer=True)
    for heads in (3, h):
        b = Builder({"b": n, "h": heads, "q": 4, "k": 4})
        folded = b.add(b.times(b.index("b"), b.size(heads)), b.index("h"))
        assert b.divmod(folded, b.size(heads)) == (b.index("b"), b.index("h"))
        assert b.divmod(folded, b.size(n))[0] is not b.index("h")


@pytest.mark.parametrize(
    ("value", "dtype", "target", "expected"),
    [
        (-3.4028234663852886e38, torch.float32, torch.bfloat16, float("-inf")),
        (-10000.0, torch.float32, torch.bfloat16, -9984.0),
        (2.7, torch.float32, torch.int64, 2),
        (2, torch.int64, torch.bool, True),
        (True, torch.bool, torch.float16, 1.0),
    ],
)
def test_casts_of_constants(value: float, dtype: torch.dtype, target: torch.dtype, expected: float) -> None:
    b = Builder({})
    assert b.cast(b.const(value, dtype), target).payload == expected


def test_texts() -> None:
    b = Builder(SIZES)
    q, k, h = b.index("q"), b.index("k"), b.index("h")
    shown = [
        b.compare("le", k, q),
        b.compare("lt", k, q),
        b.compare("gt", k, b.sub(q, b.integer(2))),
        b.compare("le", b.sub(k, q), b.integer(2)),
        b.not_(b.compare("eq", k, q)),
        b.sub(b.integer(3), b.scale(q, 2)),
        b.or_(b.compare("lt", k, q), b.not_(b.compare("eq", h, b.integer(1)))),
        b.divmod(b.add(k, q), b.integer(2))[0],
    ]
    assert_expected_inline(
        "\n".join(map(text, shown)),
        """\
k <= q
k < q
k + 2 > q
k <= q + 2
k != q
3 - 2 * q
k < q or h != 1
(k + q) // 2""",
    )
