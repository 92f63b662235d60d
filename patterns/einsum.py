"""`torch.einsum` of two operands as a matrix product.

before                                                   after
%s = torch.einsum("bqhd,bkhd->bhqk", %q, %k)             %qt = aten.permute.default(%q, [0, 2, 1, 3])
                                                         %kt = aten.permute.default(%k, [0, 2, 3, 1])
                                                         %s = aten.matmul.default(%qt, %kt)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_EINSUM = frozenset({torch.einsum, torch.functional.einsum, torch.ops.aten.einsum, torch.ops.aten.einsum.default})


def decomposition(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Tensor] | None:
    """The function to call in place of an einsum, or None: it is none, or no plain batched matrix product."""
    if target not in _EINSUM or kwargs or len(args) < 2 or not isinstance(args[0], str):
        return None
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    plan = matrix_product(equation)
    if plan is None or len(operands) != 2 or any(x.dim() != len(p) for x, p in zip(operands, plan[:2], strict=True)):
        return None
    left, right, out = plan

    def product(*_: Any) -> Tensor:
        return _permuted(torch.matmul(_permuted(operands[0], left), _permuted(operands[1], right)), out)

    return product


def matrix_product(equation: str) -> tuple[list[int], list[int], list[int]] | None:
    """Permutations of the two operands and of the product: (..., i, j) @ (..., j, k) -> (..., i, k).

    None unless each letter stands once in an operand, exactly one is summed over, one is only left, one only right, and
    all others are in both operands and in the result.
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or not all(t.isalpha() and len(set(t)) == len(t) for t in (*terms, result)):
        return None
    left, right = terms
    batch = [c for c in result if c in left and c in right]
    rows = [c for c in left if c not in right]
    columns = [c for c in right if c not in left]
    summed = [c for c in left if c in right and c not in result]
    if len(rows) != 1 or len(columns) != 1 or len(summed) != 1 or not batch:
        return None
    if sorted(result) != sorted((*batch, *rows, *columns)):
        return None
    made = (*batch, *rows, *columns)
    return (
        [left.index(c) for c in (*batch, *rows, *summed)],
        [right.index(c) for c in (*batch, *summed, *columns)],
        [made.index(c) for c in result],
    )


def _permuted(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x if list(dims) == list(range(len(dims))) else x.permute(tuple(dims))
