"""A pass over graphs of autograd that fails anywhere leaves a graph behind that computes what it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import test_joined_products_backward as of_joined_products
import test_row_sums as of_row_sums
import test_short_erf as of_short_erf
import test_table_gradients as of_table_gradients
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from varlen_inductor.lowering import joined_gradients, joined_products, row_sums, short_erf, table_gradients

Graph = tuple[fx.GraphModule, Sequence[Tensor]]


def joined(case: str) -> Graph:
    return of_joined_products.backward(of_joined_products.SIDE_BY_SIDE[case][0])


def summed() -> Graph:
    gm, x = of_row_sums.traced(lambda x: ((x * 2).sum([0]), (x * 3).sum([0]).view(2, 12)))
    return gm, [x]


def read_twice() -> Graph:
    def function(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        one_plus_erf = (x.float() * 0.7).erf() + 1
        return (one_plus_erf * gradient).half(), (one_plus_erf + 5).half()

    operands = torch.randn(40).half(), torch.randn(40).half()
    return of_short_erf.traced(function, *operands), operands


def of_tables() -> Graph:
    index, x = of_table_gradients.operands((4,), many=20)
    return of_table_gradients.traced(of_table_gradients.summed, index, x), [index, x]


CASES: dict[str, tuple[Callable[[], Graph], Callable[[fx.Graph], Any], Sequence[ModuleType]]] = {
    **{
        f"joined products, {case}": (
            lambda case=case: joined(case),
            lambda graph: joined_products.join_products(graph, "cpu"),
            (joined_products, joined_gradients),
        )
        for case in ("all", "no residual", "added, converted", "added, the innermost by itself", "added one way, then the other")
    },
    "row sums": (summed, lambda graph: row_sums.split_row_sums(graph, "cpu"), (row_sums,)),
    "short erf": (read_twice, lambda graph: short_erf.shorten_erf(graph, "cpu"), (short_erf,)),
    "table gradients": (of_tables, lambda graph: table_gradients.add_up_in_single(graph, "cpu"), (table_gradients,)),
}


class Injected(Exception):
    pass


@pytest.mark.parametrize("case", CASES)
def test_wherever_it_fails(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, run, modules = CASES[case]
    call_like = modules[0].call_like
    made = 0
    while True:
        gm, operands = build()
        wanted = pytree.tree_leaves(gm(*operands))
        left = made

        def failing(*args: Any, **kwargs: Any) -> fx.Node:
            nonlocal left
            left -= 1
            if left < 0:
                raise Injected
            return call_like(*args, **kwargs)  # type: ignore[no-any-return]

        with monkeypatch.context() as patch:
            for module in modules:
                patch.setattr(module, "call_like", failing)
            try:
                changed = run(gm.graph)
            except Injected:
                changed = None
        gm.graph.lint()
        gm.recompile()
        # The places that were done before it failed differ by rounding.
        torch.testing.assert_close(pytree.tree_leaves(gm(*operands)), wanted, rtol=2**-8, atol=1e-3)
        if changed is not None:
            assert changed and made > 2
            return
        made += 1
