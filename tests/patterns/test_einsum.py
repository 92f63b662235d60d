"""Which equations are a matrix product, and that the product is right."""

from __future__ import annotations

import pytest
import torch

from tests.patterns.zoo import captured, targets
from varlen_inductor.patterns.einsum import decomposition, matrix_product

SIZES = {"b": 2, "h": 3, "i": 4, "j": 5, "d": 6}


@pytest.mark.parametrize("equation", ["bhid,bhjd->bhij", "bihd,bjhd->bhij", "bhij,bjhd->bihd", "bid,bjd->bji", "hdb, hjd -> jhb"])
def test_products(equation: str) -> None:
    left, right = (torch.randn([SIZES[c] for c in term.strip()]) for term in equation.split("->")[0].split(","))
    product = decomposition(torch.einsum, (equation, left, right), {})
    assert product is not None
    torch.testing.assert_close(product(equation, left, right), torch.einsum(equation, left, right))
    graph = captured(lambda x, y: torch.einsum(equation, x, y), x=left, y=right).graph
    assert "aten.matmul.default" in targets(graph)
    assert "aten.einsum.default" not in targets(graph)


@pytest.mark.parametrize(
    "equation",
    [
        "ij,jk->ik",
        "bij,bjk",
        "bii,bij->bj",
        "bij,bkl->bik",
        "bijd,bjd->bi",
        "bij,bjk->bi",
        "...ij,...jk->...ik",
        "bij,bjk,bkl->bil",
        "bij->bji",
    ],
)
def test_others_stay(equation: str) -> None:
    assert matrix_product(equation) is None
