"""Random mask programs: whatever the prover claims about one must hold for every value of its inputs.

A program is drawn as a tree of torch operators over boolean, integer and floating leaves, recorded as a graph, and proven.
A refusal is always allowed; a proof is compared with eager, by brute force, on many random inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from mask_cases import Case, check, record

from varlen_inductor.patterns.masks import NotProven

F32 = torch.finfo(torch.float32)


@dataclass
class Inputs:
    """The leaves of a program: (b, q) and (b, k) masks of several dtypes, lengths, and one large integer matrix."""

    b: int
    h: int
    q: int
    k: int
    seed: int = 0

    def tensors(self) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(self.seed)

        def ints(*shape: int, high: int) -> torch.Tensor:
            return torch.randint(0, high, shape, generator=g)

        b, q, k = self.b, self.q, self.k
        wide = 3 if self.seed % 2 else 2
        return [
            ints(b, k, high=2).bool(),
            ints(b, k, high=wide),
            ints(b, q, high=2).bool(),
            ints(b, high=k + 2),
            ints(b, k, high=2).float() if self.seed % 3 else torch.zeros(b, k).masked_fill(ints(b, k, high=2).bool(), -torch.inf),
            ints(k, high=2),
            ints(b, 1, q, k, high=2).bool(),
        ]


@dataclass
class Sizes:
    b: Any
    h: int
    q: Any
    k: Any


@dataclass
class Context:
    """What a program node may use while it runs; the sizes are those of its inputs, and symbols if they are dynamic."""

    x: list[torch.Tensor]
    h: int

    @property
    def sizes(self) -> Sizes:
        (b, k), (_, q) = self.x[0].shape, self.x[2].shape
        return Sizes(b, self.h, q, k)

    @property
    def pos_q(self) -> torch.Tensor:
        return torch.arange(self.sizes.q)[:, None]

    @property
    def pos_k(self) -> torch.Tensor:
        return torch.arange(self.sizes.k)[None, :]


Program = Callable[[Context], torch.Tensor]  # gives a tensor that broadcasts to (b, h, q, k)


def leaf(name: str, run: Program) -> tuple[str, Program]:
    return name, run


def _key4(m: torch.Tensor) -> torch.Tensor:
    return m[:, None, None, :]


BOOL_LEAVES = [
    leaf("key_bool", lambda c: _key4(c.x[0])),
    leaf("key_int", lambda c: _key4(c.x[1]).bool()),
    leaf("key_is_1", lambda c: _key4(c.x[1]) == 1),
    leaf("key_above_half", lambda c: _key4(c.x[1]) > 0.5),
    leaf("key_float", lambda c: _key4(c.x[4]) != 0),
    leaf("key_float_low", lambda c: _key4(c.x[4]) < -1),
    leaf("key_shared", lambda c: c.x[5].view(1, 1, 1, -1) > 0),
    leaf("query_bool", lambda c: c.x[2][:, None, :, None]),
    leaf("lengths", lambda c: _key4(torch.arange(c.sizes.k)[None] < c.x[3][:, None])),
    leaf("left_lengths", lambda c: _key4(torch.arange(c.sizes.k)[None] >= c.sizes.k - c.x[3][:, None])),
    leaf("own_lengths", lambda c: _key4(torch.arange(c.sizes.k).expand(c.sizes.b, -1) < c.x[1].sum(1, keepdim=True))),
    leaf("causal", lambda c: c.pos_k <= c.pos_q),
    leaf("tril", lambda c: torch.ones(c.sizes.q, c.sizes.k, dtype=torch.bool).tril()),
    leaf("triu", lambda c: torch.ones(c.sizes.q, c.sizes.k).triu(1) == 0),
    leaf("window", lambda c: (c.pos_q - c.pos_k).abs() <= 1),
    leaf("sliding", lambda c: c.pos_k > c.pos_q - 2),
    leaf("ahead", lambda c: c.pos_k <= c.pos_q + 1),
    leaf("first_keys", lambda c: (c.pos_k < 2).view(1, 1, 1, -1)),
    leaf("pairs", lambda c: c.x[6]),
    leaf("nothing", lambda c: torch.ones(1, 1, 1, 1, dtype=torch.bool)),
    leaf("products", lambda c: (_key4(c.x[1]) * c.x[2][:, None, :, None].long()) == 1),
    leaf("int_window", lambda c: torch.clamp(c.pos_q - c.pos_k, min=0) < 2),
]


def _fold(c: Context, m: torch.Tensor) -> torch.Tensor:
    """Through (b * h, q, k) and back, as nn.MultiheadAttention does."""
    s = c.sizes
    full = m.expand(s.b, s.h, s.q, s.k).reshape(s.b * s.h, s.q, s.k)
    return full.view(s.b, s.h, s.q, s.k)


def _unary(name: str, f: Callable[[Context, torch.Tensor], torch.Tensor]) -> tuple[str, Any]:
    return name, f


BOOL_UNARY = [
    _unary("not", lambda c, m: ~m),
    _unary("to_int_and_back", lambda c, m: m.long() == 1),
    _unary("to_half_and_back", lambda c, m: m.to(torch.float16) > 0.25),
    _unary("expand", lambda c, m: m.expand(c.sizes.b, c.sizes.h, c.sizes.q, c.sizes.k)),
    _unary("fold", _fold),
    _unary("transpose_twice", lambda c, m: m.transpose(-1, -2).contiguous().transpose(-1, -2)),
    _unary("flip_twice", lambda c, m: m.flip(-1).flip(-1)),
    _unary("flip", lambda c, m: m.flip(-1)),
    _unary("pad_and_slice", lambda c, m: torch.nn.functional.pad(m, (1, 1), value=True)[..., 1:-1]),
    _unary("cat_and_slice", lambda c, m: torch.cat([torch.ones_like(m), m], -1)[..., m.shape[-1] :]),
    _unary("shift", lambda c, m: torch.cat([torch.ones_like(m[..., :1]), m[..., :-1]], -1)),
    _unary("masked_fill", lambda c, m: torch.zeros_like(m).masked_fill(m, True)),
    _unary("fix_rows", lambda c, m: m | ~m.any(-1, keepdim=True)),
    _unary("fix_rows_all", lambda c, m: m | torch.all(~m, dim=-1, keepdim=True)),
    _unary("drop_rows", lambda c, m: m & m.any(-1, keepdim=True)),
    _unary("squeeze", lambda c, m: m.squeeze(1).unsqueeze(1) if m.shape[1:2] == (1,) else m),
    _unary("repeat", lambda c, m: m.repeat(1, c.sizes.h, 1, 1) if m.dim() == 4 and m.shape[1] == 1 else m),
    _unary("interleave", lambda c, m: m.repeat_interleave(2, -1)[..., ::2]),
    _unary("gather", lambda c, m: torch.gather(m, -1, torch.arange(m.shape[-1]).expand(m.shape))),
]

BOOL_BINARY = [
    ("and", lambda c, a, b: a & b),
    ("or", lambda c, a, b: a | b),
    ("xor", lambda c, a, b: a ^ b),
    ("logical_and", lambda c, a, b: torch.logical_and(a, b)),
    ("mul", lambda c, a, b: a * b),
    ("int_mul", lambda c, a, b: (a.long() * b.long()) != 0),
    ("int_add", lambda c, a, b: (a.long() + b.int()) > 1),
    ("where", lambda c, a, b: torch.where(a, b, False)),
    ("fill", lambda c, a, b: torch.where(a, b, torch.zeros_like(b)).masked_fill(~a, False)),
    ("assign", lambda c, a, b: _assign(a, b)),
]


def _assign(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return torch.slice_scatter(torch.zeros(shape, dtype=torch.bool), a & b, -1, 0, shape[-1])


LOW = [-torch.inf, F32.min, -1e9, -1e4, -1.0]

TO_BIAS = [
    ("where", lambda low: lambda c, m: torch.where(m, 0.0, low)),
    ("filled", lambda low: lambda c, m: torch.zeros(m.shape).masked_fill(~m, low)),
    ("scaled", lambda low: lambda c, m: (1.0 - m.to(torch.float32)) * low),
    ("scaled_int", lambda low: lambda c, m: (1 - m.long()) * (low if low != -torch.inf else F32.min)),
    ("inverted", lambda low: lambda c, m: (1.0 - m.float()).masked_fill((1.0 - m.float()).bool(), low)),
    ("log", lambda low: lambda c, m: m.float().log()),
    ("half", lambda low: lambda c, m: torch.where(m, 0.0, low).to(torch.bfloat16).float()),
    ("unattended", lambda low: lambda c, m: _unattended(torch.where(m, 0.0, low), low)),
]
BIAS_LEAVES = [
    leaf("float_leaf", lambda c: _key4(c.x[4])),
    leaf("int_leaf", lambda c: (1.0 - _key4(c.x[1]).float()) * F32.min),
    leaf("float_keep", lambda c: (1.0 - _key4(c.x[4])) * -1e9),
    leaf("triu", lambda c: torch.full((c.sizes.q, c.sizes.k), -torch.inf).triu(1)),
    leaf("alibi", lambda c: (c.pos_k - c.pos_q) * 0.5),
]


def _unattended(bias: torch.Tensor, low: float) -> torch.Tensor:
    return bias.mul(~torch.all(bias == low, dim=-1, keepdim=True))


@st.composite
def bools(draw: st.DrawFn, depth: int = 3) -> tuple[str, Program]:
    choice = draw(st.integers(0, 3)) if depth else 0
    if choice == 0:
        return draw(st.sampled_from(BOOL_LEAVES))
    if choice == 1:
        name, f = draw(st.sampled_from(BOOL_UNARY))
        inner_name, inner = draw(bools(depth - 1))
        return f"{name}({inner_name})", lambda c: f(c, inner(c))
    name, f = draw(st.sampled_from(BOOL_BINARY))
    (left_name, left), (right_name, right) = draw(bools(depth - 1)), draw(bools(depth - 1))
    return f"{name}({left_name}, {right_name})", lambda c: f(c, left(c), right(c))


@st.composite
def biases(draw: st.DrawFn, depth: int = 2) -> tuple[str, Program]:
    choice = draw(st.integers(0, 3)) if depth else draw(st.integers(1, 3))
    if choice == 0:
        (left_name, left), (right_name, right) = draw(biases(depth - 1)), draw(biases(depth - 1))
        name, f = draw(st.sampled_from([("add", torch.add), ("minimum", torch.minimum)]))
        return f"{name}({left_name}, {right_name})", lambda c: f(left(c), right(c))
    if choice == 1:
        return draw(st.sampled_from(BIAS_LEAVES))
    name, make = draw(st.sampled_from(TO_BIAS))
    low = draw(st.sampled_from(LOW))
    f = make(low)
    inner_name, inner = draw(bools(2))
    return f"{name}[{low:g}]({inner_name})", lambda c: f(c, inner(c))


SIZES = st.builds(
    Inputs, b=st.sampled_from([1, 2, 3]), h=st.sampled_from([1, 2]), q=st.sampled_from([1, 3, 4]), k=st.sampled_from([1, 3, 4])
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def run(sizes: Inputs, programs: list[tuple[str, Program]], *, dynamic: bool = False, trials: int = 5, **options: Any) -> None:
    """Prove the programs; if they are proven, compare the claims with eager on inputs of many kinds."""
    one = "applied" not in options

    def program(*x: torch.Tensor) -> Any:
        made = [f(Context(list(x), sizes.h)) for _, f in programs]
        return made[0] if one else made

    gm = record(program, *sizes.tensors(), dynamic=dynamic)
    case = Case(gm, sizes.b, sizes.h, sizes.q, sizes.k, **options)
    if dynamic:
        shapes = [n.meta["val"].shape for n in gm.graph.nodes if n.op == "placeholder"]
        (b, k), (_, q) = shapes[0], shapes[2]
        case = Case(gm, b, sizes.h, q, k, **options)
    try:
        proof = case.prove()
    except NotProven:
        event("refused")
        return
    event("proven")
    others = [Inputs(sizes.b, sizes.h, sizes.q, sizes.k, seed) for seed in range(trials)]
    if dynamic and not gm.shape_env.guards:
        event("other sizes")
        others += [Inputs(sizes.b + 1, sizes.h, sizes.q + 2, sizes.k + 3, seed) for seed in range(trials)]
    held = [check(replace(case, b=i.b, q=i.q, k=i.k), proof, i.tensors()) for i in others]
    assert all(held) or proof.obligations, [name for name, _ in programs]


@SETTINGS
@given(SIZES, bools(), st.sampled_from(["sdpa", "decomposed"]))
def test_boolean_masks(sizes: Inputs, program: tuple[str, Program], spelling: str) -> None:
    run(sizes, [program], spelling=spelling)


@SETTINGS
@given(SIZES, biases(), st.sampled_from(["sdpa", "decomposed"]), st.sampled_from(DTYPES))
def test_additive_masks(sizes: Inputs, program: tuple[str, Program], spelling: str, dtype: torch.dtype) -> None:
    run(sizes, [program], spelling=spelling, dtype=dtype)


STEPS = st.one_of(
    st.tuples(st.sampled_from(["fill", "where_keep"]), st.sampled_from(LOW), bools(2)),
    st.tuples(st.just("add"), st.none(), biases(1)),
)


@settings(SETTINGS, max_examples=40)
@given(SIZES, st.lists(STEPS, min_size=1, max_size=3), st.sampled_from([torch.float32, torch.float64]))
def test_several_steps(sizes: Inputs, steps: list[tuple[str, float | None, tuple[str, Program]]], dtype: torch.dtype) -> None:
    applied = tuple((kind, value) for kind, value, _ in steps)
    run(sizes, [program for _, _, program in steps], spelling="decomposed", dtype=dtype, applied=applied)


@settings(SETTINGS, max_examples=25)
@given(bools())
def test_dynamic_shapes(program: tuple[str, Program]) -> None:
    run(Inputs(2, 2, 5, 4), [program], dynamic=True, trials=2)


@pytest.mark.parametrize("name", [name for name, _ in BOOL_LEAVES if name not in ("pairs",)])
def test_every_family_is_proven(name: str) -> None:
    """Refusing everything would pass the tests above."""
    sizes = Inputs(2, 2, 4, 4)
    program = dict(BOOL_LEAVES)[name]
    gm = record(lambda *x: program(Context(list(x), sizes.h)), *sizes.tensors())
    case = Case(gm, 2, 2, 4, 4)
    proof = case.prove()
    assert any(check(case, proof, Inputs(2, 2, 4, 4, seed).tensors()) for seed in range(6))
