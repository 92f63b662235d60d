"""Sums over packed rows are made in chunks, where that is known to be right and to be worth it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from varlen_inductor.lowering.row_sums import split_row_sums

aten = torch.ops.aten


def traced(
    function: Callable[[Tensor], Any], dtype: torch.dtype = torch.float32, width: int = 24, chunk: int = 64
) -> tuple[fx.GraphModule, Tensor]:
    """The graph of ``function`` of rows (T, width), T a symbol that is known to be a multiple of ``chunk``; and an operand."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.randn(3 * chunk, width).to(dtype), symbolic_context=sizes)
    for n in {chunk, min(chunk, 32)}:
        torch._check(x.shape[0] % n == 0)
    return make_fx(function)(x), torch.randn(5 * chunk, width).to(dtype)


def sums(gm: fx.GraphModule) -> list[list[int]]:
    """The dims of each sum of a graph."""
    return [list(node.args[1]) for node in gm.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)]


def check(gm: fx.GraphModule, x: Tensor, expected: int) -> None:
    before, wanted, form = sums(gm), gm(x), gm.graph.output_node().args[0].meta["val"]
    assert split_row_sums(gm.graph, x.device.type) == expected
    gm.graph.lint()
    gm.recompile()
    assert sums(gm) == ([[0], [1]] * expected if expected else before)
    made = gm.graph.output_node().args[0].meta["val"]
    assert (made.dtype, made.shape) == (form.dtype, form.shape)
    exact = x.dtype == torch.float64
    torch.testing.assert_close(gm(x), wanted, rtol=1e-12 if exact else None, atol=1e-12 if exact else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
def test_is_split(dtype: torch.dtype, keepdim: bool) -> None:
    check(*traced(lambda x: (x * 2).sum([0], keepdim), dtype), expected=1)


def test_half_precision_is_summed_in_single() -> None:
    """2048 + 1 is 2048 in half precision; a sum of sums must not round in between."""
    gm, _ = traced(lambda x: x.sum([0]), torch.float16)
    assert split_row_sums(gm.graph, "cpu") == 1
    gm.recompile()
    x = torch.ones(40 * 64, 24, dtype=torch.float16)
    x[:64] = 2048 / 64
    x[64] = 2048.0
    assert (gm(x) == float(2 * 2048 + 39 * 64 - 1)).all()


def test_another_dtype() -> None:
    check(*traced(lambda x: x.sum([0], dtype=torch.float32), torch.bfloat16), expected=1)


STAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda x: x.sum([1]),
    "everything": lambda x: x.sum([0, 1]),
    "a row more than chunks": lambda x: torch.cat([x, x[:1]]).sum([0]),
    "so many rows": lambda x: x[:128].sum([0]),
    "a sum of whole numbers": lambda x: x.sum([0], dtype=torch.int32),
    "whether any is not zero": lambda x: x.sum([0], dtype=torch.bool),
    "numbers that are not floating": lambda x: (x > 0).long().sum([0]),
}


@pytest.mark.parametrize("case", STAYS)
def test_stays(case: str) -> None:
    gm, x = traced(STAYS[case])
    check(gm, x, expected=0)


def test_many_columns_stay() -> None:
    check(*traced(lambda x: x.sum([0]), width=140000, chunk=32), expected=0)


def test_length_of_chunks() -> None:
    """The shorter, where the sums are many enough."""

    def length(width: int, chunk: int = 64) -> object:
        gm, x = traced(lambda x: x.sum([0]), width=width, chunk=chunk)
        check(gm, x, expected=1)
        view, _ = gm.graph.find_nodes(op="call_function", target=aten.view.default)
        return view.args[1][1]

    assert [length(width) for width in (8, 768, 1536, 3072)] == [64, 64, 32, 32]
    assert length(8, chunk=32) == 32


def test_rows_that_are_no_chunks_stay() -> None:
    check(*traced(lambda x: x.sum([0]), chunk=16), expected=0)


def test_another_device_stays() -> None:
    gm, _ = traced(lambda x: x.sum([0]))
    assert split_row_sums(gm.graph, "cuda") == 0


def normed(x: Tensor) -> Tensor:
    """The gradients of a norm's operand and weight, near enough: one reduces each row, the other sums rows."""
    scaled = x * 3
    return scaled.sum([1], True) + (scaled * x).sum([0]) + (x @ x.T @ x).sum([0])


@pytest.mark.parametrize("mixed", [False, True])
def test_what_inductor_sums_while_it_reduces_rows(mixed: bool) -> None:
    """Rows that are reduced one by one, too, are left to Inductor where it does both at once."""
    gm, x = traced(normed, torch.float64)
    wanted = gm(x)
    with inductor.patch("triton.mix_order_reduction", mixed):
        assert split_row_sums(gm.graph, "cpu") == (1 if mixed else 2)
    gm.recompile()
    torch.testing.assert_close(gm(x), wanted)


def several(x: Tensor) -> tuple[Tensor, ...]:
    """Sums of two forms that are results, on their way through other nodes; one that is used; and one of a form of its own."""
    used = (x * 5).sum([0])
    return (
        torch.ops.prims.convert_element_type.default((x * 2).sum([0]), torch.float32).view(4, 6),
        (x * 3).sum([0]),
        x.sum([0], True).view(24),
        (x + used).sum([0]),
        x.view(-1, 4, 6).sum([0]),
        (x - 1).sum([0], True),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_results_are_added_up_together(dtype: torch.dtype) -> None:
    gm, x = traced(several, dtype)
    wanted = gm(x)
    assert split_row_sums(gm.graph, "cpu") == 7
    gm.graph.lint()
    gm.recompile()
    # Two without their dim and two with it; what is used at once, and what has a form of its own, is added up by itself.
    (one, other) = gm.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert (len(one.args[0]), len(other.args[0])) == (2, 2)
    assert sorted(map(str, sums(gm))) == ["[0]"] * 7 + ["[1]"] * 5
    for found, expected in zip(gm(x), wanted, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)
    for found, node in zip(gm(x), gm.graph.output_node().args[0], strict=True):
        assert (found.dtype, found.shape) == (node.meta["val"].dtype, node.meta["val"].shape)


def to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.prims.convert_element_type.default(x, dtype)


HALF, SINGLE = torch.bfloat16, torch.float32
CONVERTED: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "alike": (lambda x: tuple(to((x * i).sum([0]), HALF) for i in range(4)), 1),
    "through views": (lambda x: tuple(to((x * i).sum([0], True).view(-1)[:8], SINGLE) for i in range(4)), 1),
    "pieces": (lambda x: tuple(to(y, SINGLE) for i in (1, 2) for z in [(x * i).sum([0])] for y in (z[:8], z[8:])), 1),
    "twice": (lambda x: tuple(to(to((x * i).sum([0]), HALF), SINGLE).view(4, 6) for i in range(4)), 2),
    "to two": (lambda x: tuple(to(z, each) for i in (1, 2) for z in [(x * i).sum([0])] for each in (SINGLE, HALF)), 4),
    "two kinds": (lambda x: tuple(to((x * i).sum([0]), (SINGLE, HALF)[i % 2]) for i in range(4)), 2),
    "and as they are": (lambda x: tuple(y for i in (1, 2) for z in [(x * i).sum([0])] for y in (z, to(z, SINGLE))), 2),
    "one by itself": (lambda x: to(x.sum([0]), HALF).view(2, 12), 1),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_results_are_converted_together(case: str) -> None:
    function, conversions = CONVERTED[case]
    gm, x = traced(function, torch.float64)
    wanted = gm(x)
    assert split_row_sums(gm.graph, "cpu")
    gm.graph.lint()
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default)) == conversions
    torch.testing.assert_close(gm(x), wanted)
    for node, expected in zip(pytree.tree_leaves(gm.graph.output_node().args[0]), pytree.tree_leaves(wanted), strict=True):
        assert (node.meta["val"].dtype, node.meta["val"].shape) == (expected.dtype, expected.shape)


def test_a_result_that_is_used_too_is_added_up_at_once() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = (x * 2).sum([0])
        return bias, (x * bias).sum([0]), (x * 7).sum([0])

    gm, x = traced(both, torch.float64)
    wanted = gm(x)
    assert split_row_sums(gm.graph, "cpu") == 3
    gm.graph.lint()
    gm.recompile()
    (joined,) = gm.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert len(joined.args[0]) == 2
    torch.testing.assert_close(gm(x), wanted)
