"""Products with the gradients of query, key and value become one, where nobody can tell but by rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from product_graphs import LONGEST, OFFSETS, E, H, T, aten, check, lines, ops, products, traced
from varlen_inductor.lowering import joined_gradients, joined_products
from varlen_inductor.lowering.joined_products import join_products

Gradients = tuple[Tensor, Tensor, Tensor]


def backward(
    place: Callable[..., Any], heads_k: int = H, dtype: torch.dtype = torch.float64
) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph of what ``place`` makes of three gradients, of a matrix to add to, of rows and of three weights."""
    torch.manual_seed(0)
    width = E // H
    shapes = (T, H, width), (T, H, width), (T, heads_k, width), (T, heads_k, width)
    grad, query, key, value = (torch.randn(shape, dtype=dtype) for shape in shapes)
    out, lse, rng = ops.varlen_attn(query, key, value, OFFSETS, OFFSETS, LONGEST, LONGEST)
    residual, rows = torch.randn(T, E, dtype=dtype), torch.randn(T, E, dtype=dtype)
    weights = [torch.randn(n * width, E, dtype=dtype) for n in (H, heads_k, heads_k)]

    def graph(grad: Tensor, residual: Tensor, rows: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, *others: Tensor) -> Any:
        gradients = ops.varlen_attn_backward(grad, None, *others, others[-1], LONGEST, LONGEST, kernels="cpu")
        return place([x.reshape(rows.shape[0], -1) for x in gradients], residual, rows, [wq, wk, wv])

    operands = [grad, residual, rows, *weights, out, lse, rng, query, key, value, OFFSETS]
    return traced(graph, operands), operands


def of_rows(gradients: Gradients, residual: Tensor | None, weights: list[Tensor], order: tuple[int, ...] = (2, 1, 0)) -> Tensor:
    for i in order:
        weight = aten.permute(aten.permute(weights[i], [1, 0]), [1, 0])
        residual = aten.mm(gradients[i], weight) if residual is None else aten.addmm(residual, gradients[i], weight)
    assert residual is not None
    return residual


def added(
    gradients: Gradients, residual: Tensor | None, weights: list[Tensor], convert: bool = False, order: str = "r012"
) -> Tensor:
    """The same, added by operators of their own; ``order`` is that of the sum, brackets in it are sums that are added."""
    terms = {str(i): aten.mm(g, w) for i, (g, w) in enumerate(zip(gradients, weights, strict=True))}
    if convert:
        terms = {i: torch.ops.prims.convert_element_type(term, torch.float32) for i, term in terms.items()}
    if residual is not None:
        terms["r"] = residual.float() if convert else residual
    total: list[list[Tensor]] = [[]]
    for each in order:
        if each == "(":
            total.append([])
            continue
        term = sum_of(total.pop()) if each == ")" else terms[each]
        total[-1].append(term)
    return sum_of(total[0])


def sum_of(terms: list[Tensor]) -> Tensor:
    first, *rest = terms
    for each in rest:
        first = aten.add(first, each)
    return first


def of_weights(gradients: Gradients, rows: Tensor) -> list[Tensor]:
    return [aten.mm(aten.permute(g, [1, 0]), rows) for g in gradients]


def of_biases(gradients: Gradients) -> list[Tensor]:
    return [g.sum([0], keepdim=True).view(-1) for g in gradients]


SIDE_BY_SIDE: dict[str, tuple[Callable[..., Any], int]] = {
    "all": (lambda g, r, x, w: (of_rows(g, r, w), of_weights(g, x), of_biases(g)), 2),
    "no residual": (lambda g, r, x, w: (of_rows(g, None, w), of_weights(g, x), of_biases(g)), 2),
    "another order": (lambda g, r, x, w: (of_rows(g, r, w, (1, 0, 2)), of_weights(g, x)), 2),
    "frozen": (lambda g, r, x, w: of_rows(g, r, w), 1),
    "added": (lambda g, r, x, w: (added(g, r, w), of_weights(g, x)), 2),
    "added, converted": (lambda g, r, x, w: (added(g, r, w, True), of_weights(g, x)), 2),
    "added, in another order": (lambda g, r, x, w: added(g, r, w, order="2r10"), 1),
    "added to nothing": (lambda g, r, x, w: added(g, None, w, order="120"), 1),
    "added to nothing, converted": (lambda g, r, x, w: added(g, None, w, True, order="021"), 1),
    "added to a sum": (lambda g, r, x, w: added(g, r, w, order="0(rr)12"), 1),
    "added with something between": (lambda g, r, x, w: added(g, r, w, order="0r1r2r"), 1),
    "added, the innermost by itself": (lambda g, r, x, w: of_rows(g, added(g, None, w, order="2"), w, (1, 0)), 1),
    "added, then another way": (lambda g, r, x, w: aten.add(of_rows(g, r, w, (0, 1)), aten.mm(g[2], w[2])), 1),
    "added one way, then the other": (lambda g, r, x, w: of_rows(g, aten.add(r, aten.mm(g[0], w[0])), w, (2, 1)), 1),
    "one frozen": (lambda g, r, x, w: (of_rows(g, r, w), of_weights(g, x)[:2], of_biases(g)), 3),
    "other rows for the weights": (lambda g, r, x, w: (of_rows(g, r, w), of_weights(g, x)[:2], of_weights(g, x.sin())[2]), 4),
    "sums in different forms": (lambda g, r, x, w: (of_rows(g, r, w), of_biases(g)[0], g[1].sum(0), g[2].sum(0)), 1),
    "the gradients are read elsewhere": (lambda g, r, x, w: (of_rows(g, r, w), (g[0] * 2).sum(1), of_weights(g, x)), 2),
}
LEFT: dict[str, tuple[Callable[..., Any], int]] = {
    "one sum is used in between": (lambda g, r, x, w: (of_rows(g, s := of_rows(g[:1] + g[:2], r, w, (0,)), w, (1, 2)), s), 3),
    "one is not multiplied": (lambda g, r, x, w: (of_rows(g, r, w, (1, 0)), g[2].sum(0)), 2),
    "two sums": (lambda g, r, x, w: of_rows(g, r, w, (0,)) + of_rows(g, None, w, (1, 2)), 3),
    "a sum of two sums": (lambda g, r, x, w: added(g, r, w, order="(r0)(12)"), 3),
    "one is read, too": (lambda g, r, x, w: (of_rows(g, y := aten.mm(g[0], w[0]), w, (1, 2)), y.sin()), 3),
    "a sum so far is read, too": (
        lambda g, r, x, w: (aten.add(y := aten.add(r, aten.mm(g[0], w[0])), aten.mm(g[1], w[1])), y.sin(), g[2].sum(0)),
        2,
    ),
    "subtracted": (lambda g, r, x, w: aten.sub(of_rows(g, r, w, (0, 1)), aten.mm(g[2], w[2])), 3),
    "scaled": (lambda g, r, x, w: aten.add(of_rows(g, r, w, (0, 1)), aten.mm(g[2], w[2]), alpha=2), 3),
    "added to a row": (lambda g, r, x, w: of_rows(g, r[0], w), 3),
    "multiplied with a product": (
        lambda g, r, x, w: aten.addmm(r, aten.mm(g[0], w[0]), w[1]) + aten.mm(g[1], w[1]) + aten.mm(g[2], w[2]),
        4,
    ),
    "a gradient is a result": (lambda g, r, x, w: (of_rows(g, r, w), g[1]), 3),
    "a gradient is multiplied twice": (lambda g, r, x, w: (of_rows(g, r, w), aten.mm(g[1], w[0])), 4),
    "under another product": (
        lambda g, r, x, w: aten.add(
            aten.add(aten.addmm(aten.mm(g[0], w[0]), x, x.t() @ x), aten.mm(g[1], w[1])), aten.mm(g[2], w[2])
        ),
        5,
    ),
    "under another product, one into the other": (
        lambda g, r, x, w: aten.addmm(aten.addmm(aten.addmm(aten.mm(g[0], w[0]), x, x.t() @ x), g[1], w[1]), g[2], w[2]),
        5,
    ),
    "weights only": (lambda g, r, x, w: of_weights(g, x), 3),
}


@pytest.mark.parametrize("case", SIDE_BY_SIDE)
def test_gradients_side_by_side(case: str) -> None:
    place, left = SIDE_BY_SIDE[case]
    check(*backward(place), 1, left)


@pytest.mark.parametrize("case", LEFT)
def test_gradients_stay_apart(case: str) -> None:
    place, left = LEFT[case]
    check(*backward(place), 0, left)


def test_gradients_stay_on_another_device() -> None:
    assert join_products(backward(SIDE_BY_SIDE["all"][0])[0].graph) == 0


def test_gradients_of_a_kernel_that_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_gradients, "writes_in_place", lambda attention: False)
    gm, operands = backward(SIDE_BY_SIDE["all"][0])
    check(gm, operands, 0, 6)


@pytest.mark.parametrize("limit", [3 * E * E, 3 * E * E - 1])
def test_gradients_of_wide_weights(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_products, "MOST_NUMBERS", limit)
    check(*backward(SIDE_BY_SIDE["all"][0]), *((1, 2) if limit == 3 * E * E else (0, 6)))


@pytest.mark.skipif(not hasattr(aten.mm, "dtype"), reason="this PyTorch has no products in another dtype")
def test_gradients_of_weights_in_another_dtype() -> None:
    """They stay what they are; the gradient of the rows is one product."""

    def place(g: Gradients, r: Tensor, x: Tensor, w: list[Tensor]) -> Any:
        return of_rows(g, r, w), [aten.mm.dtype(aten.permute(y, [1, 0]), x, torch.float32) for y in g]

    gm, _ = backward(place, dtype=torch.bfloat16)
    assert join_products(gm.graph, "cpu") == 1
    assert [n.meta["val"].dtype for n in gm.graph.nodes if n.target is aten.mm.dtype] == [torch.float32] * 3
    assert products(gm) == 1


def test_a_product_without_readers() -> None:
    gm, _ = backward(lambda g, r, x, w: (added(g, r, w), aten.mm(g[0], w[0])))
    dead = gm.graph.output_node().args[0][1]
    gm.graph.output_node().args = ((gm.graph.output_node().args[0][0],),)
    assert not dead.users
    assert join_products(gm.graph, "cpu") == 0


def test_shared_heads() -> None:
    check(*backward(SIDE_BY_SIDE["all"][0], heads_k=1), 1, 2)


def test_backward_graph() -> None:
    gm, operands = backward(SIDE_BY_SIDE["all"][0])
    check(gm, operands, 1, 2)
    gm.graph.eliminate_dead_code()
    assert_expected_inline(
        lines(gm),
        """\
varlen_attn_backward_joined_default = varlen_inductor.varlen_attn_backward_joined.default(arg0_1, None, arg6_1, arg7_1, arg8_1)
cat_default = aten.cat.default([arg3_1, arg4_1, arg5_1],)
slice_tensor = aten.slice.Tensor(cat_default, 0, 0, 48)
addmm_default = aten.addmm.default(arg1_1, varlen_attn_backward_joined_default, slice_tensor)
permute_default = aten.permute.default(varlen_attn_backward_joined_default, [1, 0])
mm_default_4 = aten.mm.default(permute_default, arg2_1)
slice_tensor_4 = aten.slice.Tensor(mm_default_4, 0, 0, 16)
slice_tensor_5 = aten.slice.Tensor(mm_default_4, 0, 16, 32)
slice_tensor_6 = aten.slice.Tensor(mm_default_4, 0, 32, 48)
sum_dim_int_list = aten.sum.dim_IntList(varlen_attn_backward_joined_default, [0], True)
slice_tensor_7 = aten.slice.Tensor(sum_dim_int_list, 1, 0, 16)
slice_tensor_8 = aten.slice.Tensor(sum_dim_int_list, 1, 16, 32)
slice_tensor_9 = aten.slice.Tensor(sum_dim_int_list, 1, 32, 48)
view_3 = aten.view.default(slice_tensor_7, [-1])
view_4 = aten.view.default(slice_tensor_8, [-1])
view_5 = aten.view.default(slice_tensor_9, [-1])""",
    )
