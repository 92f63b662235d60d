"""Sums by row that begin with zeros are made in float32, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from varlen_inductor.lowering import after_grad, table_gradients
from varlen_inductor.lowering.table_gradients import add_up_in_single

aten = torch.ops.aten
ROWS = 5


def traced(function: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*args)


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, many: int = 400) -> tuple[Tensor, Tensor]:
    return torch.randint(ROWS, (many,)), torch.randn(many, *shape).to(dtype)


def summed(index: Tensor, x: Tensor) -> Tensor:
    return torch.full((ROWS, *x.shape[1:]), 0, dtype=x.dtype).index_add(0, index, x)


@pytest.mark.parametrize("shape", [(), (1,), (16,), (2, 1, 8)], ids=str)
def test_is_summed_in_single(shape: tuple[int, ...]) -> None:
    index, x = operands(shape)
    gm = traced(summed, index, x)
    before = gm.graph.output_node().args[0].meta["val"]
    assert add_up_in_single(gm.graph, "cpu") == 1
    gm.graph.lint()
    gm.recompile()
    after = gm.graph.output_node().args[0].meta["val"]
    assert (after.dtype, after.shape) == (before.dtype, before.shape)
    assert not gm.graph.find_nodes(op="call_function", target=aten.index_add.default)
    (total,) = gm.graph.find_nodes(op="call_function", target=aten.index_put.default)
    assert total.meta["val"].dtype == torch.float32
    torch.testing.assert_close(gm(index, x), summed(index, x.double()).to(torch.bfloat16), rtol=2**-8, atol=1e-4)


def test_zeros_that_others_read_stay() -> None:
    def function(index: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = torch.full((ROWS, 4), 0, dtype=x.dtype)
        return zeros.index_add(0, index, x), zeros

    gm = traced(function, *operands((4,)))
    assert add_up_in_single(gm.graph, "cpu") == 1
    gm.graph.lint()
    gm.recompile()
    assert [y.dtype for y in gm(*operands((4,)))] == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    "function",
    [
        lambda index, x: torch.full((ROWS, 4), 1, dtype=x.dtype).index_add(0, index, x),
        lambda index, x: (x[:ROWS] * 2).index_add(0, index, x),
        lambda index, x: torch.full((ROWS, 4), 0, dtype=x.dtype).index_add(0, index, x, alpha=2),
        lambda index, x: torch.full((4, ROWS), 0, dtype=x.dtype).index_add(1, index, x.t()),
        lambda index, x: summed(index, x.float()),
        lambda index, x: summed(index, x.half()),
    ],
    ids=["ones", "something", "alpha", "columns", "float32", "float16"],
)
def test_what_stays(function: Callable[..., Any]) -> None:
    gm = traced(function, *operands((4,)))
    assert gm.graph.find_nodes(op="call_function", target=aten.index_add.default)
    assert add_up_in_single(gm.graph, "cpu") == 0


def test_large_tables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, changed in ((4 * ROWS, 1), (4 * ROWS - 1, 0)):
        monkeypatch.setattr(table_gradients, "MOST_NUMBERS", most)
        assert add_up_in_single(traced(summed, *operands((4,))).graph, "cpu") == changed


def test_other_devices_stay() -> None:
    assert add_up_in_single(traced(summed, *operands((4,))).graph) == 0


def test_the_device_stays_the_same() -> None:
    """What it makes has the device of what was there."""
    with FakeTensorMode():
        index, x = torch.zeros(9, dtype=torch.int64, device="meta"), torch.zeros(9, 4, dtype=torch.bfloat16, device="meta")

        def function(index: Tensor, x: Tensor) -> Tensor:
            return torch.full((ROWS, 4), 0, dtype=x.dtype, device=x.device).index_add(0, index, x)

        gm = make_fx(function)(index, x)
    assert add_up_in_single(gm.graph, "meta") == 1
    assert {n.meta["val"].device.type for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor)} == {"meta"}


def test_it_is_among_the_passes() -> None:
    assert add_up_in_single in after_grad.PASSES
