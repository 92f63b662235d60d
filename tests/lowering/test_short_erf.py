"""The shorter GELU rounds fewer numbers of half precision wrongly than what it replaces, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import gelu

from half_precision import Shorter, all_numbers, gelu_and_gradient, wrongly_rounded
from varlen_inductor.lowering import after_grad
from varlen_inductor.lowering.short_erf import COEFFICIENTS, shorten_erf

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


def traced(function: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*args)


def differentiated(x: Tensor, gradient: Tensor) -> Tensor:
    return aten.gelu_backward(gradient, x)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_number(dtype: torch.dtype) -> None:
    x = all_numbers(dtype)
    ones = torch.ones_like(x)
    for function, inputs, truth in zip((gelu, differentiated), ((x,), (x, ones)), gelu_and_gradient(x), strict=True):
        gm = traced(function, *inputs)
        before = gm(*inputs)
        assert shorten_erf(gm.graph, "cpu") == 1
        gm.graph.lint()
        gm.recompile()
        assert not gm.graph.find_nodes(op="call_function", target=aten.erf.default)
        after = gm(*inputs)
        assert (after.dtype, after.shape, after.stride()) == (before.dtype, before.shape, before.stride())
        assert wrongly_rounded(after, truth) <= wrongly_rounded(before, truth)
        some, half_a_step = x > -4, torch.finfo(dtype).eps / 2
        torch.testing.assert_close(after[some].double(), truth[some], rtol=half_a_step + 1e-6, atol=1e-7, equal_nan=True)
        assert torch.equal(after.isnan(), before.isnan())
        assert torch.equal(after.isinf(), before.isinf())


def test_in_generated_code() -> None:
    x = all_numbers(torch.bfloat16).requires_grad_()
    shorter = Shorter("cpu")
    out = torch.compile(gelu, options={"post_grad_custom_post_pass": shorter})(x)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert shorter.changed == [1, 1]
    torch._dynamo.reset()
    usual = torch.compile(gelu)(x)
    (usual_grad,) = torch.autograd.grad(usual, x, torch.ones_like(out))
    for after, before, truth in zip((out, grad), (usual, usual_grad), gelu_and_gradient(x), strict=True):
        assert wrongly_rounded(after, truth) <= wrongly_rounded(before, truth)
        assert torch.equal(after.isnan(), before.isnan())


def test_it_falls_for_ever() -> None:
    """So that no large number comes out larger than a smaller one."""
    a = torch.cat([torch.linspace(0, 100, 100001), torch.logspace(2.01, 38, 1000)]).double()
    exponent = torch.zeros_like(a)
    for coefficient in reversed(COEFFICIENTS):
        exponent = exponent * a + coefficient
    assert (exponent.diff() < 0).all()


def test_each_reader_has_its_own() -> None:
    """Nothing that takes many operations is read twice."""

    def function(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        z = x.float() * 0.7
        one_plus_erf = z.erf() + 1
        return (one_plus_erf * gradient).half(), (one_plus_erf + 5).half()

    x, gradient = torch.randn(40).half(), torch.randn(40).half()
    gm = traced(function, x, gradient)
    expected = gm(x, gradient)
    assert shorten_erf(gm.graph, "cpu") == 1
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(x, gradient), expected)
    powers = gm.graph.find_nodes(op="call_function", target=aten.exp2.default)
    assert len(powers) == 2
    assert all(len(node.users) == 1 for node in powers)


def test_erf_that_is_read_as_it_is_stays() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        erf = (x.float() * 0.7).erf()
        return (erf + 1).half(), erf

    x = torch.randn(40).half()
    gm = traced(function, x)
    assert shorten_erf(gm.graph, "cpu") == 1
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(x), function(x))
    assert torch.equal(gm(x)[1], function(x)[1])


def twice_gelu(x: Tensor) -> Tensor:
    """In float32, as it is where Inductor has left out a rounding between two operations."""
    return x.float() * (1 + (x.float() * 0.7).erf())


MADE_OF_IT: dict[str, tuple[Callable[..., Any], int]] = {
    "a product": (lambda x, w: twice_gelu(x).half() @ w, 1),
    "a view of it": (lambda x, w: twice_gelu(x).half().view(2, 4, 8).view(8, 8).t() @ w, 1),
    "a product and a sum": (lambda x, w: ((y := twice_gelu(x).half()) @ w, y.sum(0)), 1),
    "two products": (lambda x, w: (y := twice_gelu(x).half() * w) @ w + w @ y, 1),
    "side by side": (lambda x, w: torch.cat([twice_gelu(x).half(), w]), 1),
    "a result": (lambda x, w: (twice_gelu(x) + 5).half().view(64), 1),
    "a sum": (lambda x, w: twice_gelu(x).half().sum(0), 0),
    "a norm": (lambda x, w: ((y := twice_gelu(x)) - y.mean(1, keepdim=True)).half() @ w, 0),
    "read twice": (lambda x, w: ((y := twice_gelu(x)) * (y + 5)).half() @ w, 0),
    "a result in float32": (lambda x, w: twice_gelu(x), 0),
    "a product in float32": (lambda x, w: twice_gelu(x) @ w.float(), 0),
}


@pytest.mark.parametrize("case", MADE_OF_IT)
def test_what_is_made_of_it(case: str) -> None:
    """It must be a tensor anyway, in half precision; before that nothing is read twice, and nothing is summed."""
    function, changed = MADE_OF_IT[case]
    x, w = torch.randn(8, 8).half(), torch.randn(8, 8).half()
    gm = traced(function, x, w)
    wanted = gm(x, w)
    assert shorten_erf(gm.graph, "cpu") == changed
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(x, w), wanted)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: gelu((x.double() * 0.5).float()).half(),
        lambda x: gelu(x.double()).half(),
        lambda x: gelu(x, approximate="tanh"),
        lambda x: ((x.float() * 0.7).erf() + 2).half(),
        lambda x: ((x.float() * 0.7).erf() + x).half(),
        lambda x: (torch.add((x.float() * 0.7).erf(), 1, alpha=2)).half(),
        lambda x: ((x.float() * x.float()).erf() + 1).half(),
        lambda x: (x.float().erf() + 1).half(),
        lambda x: ((x.float() + 0.7).erf() + 1).half(),
        lambda x: ((x * 0.7).erf() + 1).half(),
    ],
    ids=["float32", "float64", "tanh", "two", "tensor", "alpha", "product", "no factor", "sum", "rounded"],
)
def test_what_stays(function: Callable[[Tensor], Tensor]) -> None:
    gm = traced(function, torch.randn(4).half())
    before = str(gm.graph)
    assert shorten_erf(gm.graph, "cpu") == 0
    assert str(gm.graph) == before


def test_other_devices_stay() -> None:
    assert shorten_erf(traced(gelu, torch.randn(4).half()).graph) == 0


def test_the_device_stays_the_same() -> None:
    with FakeTensorMode():
        gm = make_fx(gelu, decomposition_table=select_decomp_table())(torch.zeros(9, dtype=torch.half, device="meta"))
    assert shorten_erf(gm.graph, "meta") == 1
    assert {n.meta["val"].device.type for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor)} == {"meta"}


def test_it_is_among_the_passes() -> None:
    assert shorten_erf in after_grad.PASSES
