"""Rows behind sequences, by PyTorch operations and by the Triton kernel in Triton's interpreter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triton_interpreter import interpret, needs_interpreter
from varlen_inductor.ops.backends import tails
from varlen_inductor.ops.problem import Layout

BAD = (math.nan, math.inf, -math.inf)


def rows(tokens: int, heads: int, dim: int, layout: str) -> Tensor:
    x = torch.randn(tokens, heads, dim)
    if layout == "slice":
        return torch.randn(tokens, 3, heads, dim)[:, 1].copy_(x)
    return torch.randn(heads, tokens, dim).transpose(0, 1).copy_(x) if layout == "heads first" else x


def spoil(x: Tensor, behind: list[int]) -> Tensor:
    for i, row in enumerate(behind):
        x[row, i % x.shape[1], i % x.shape[2]] = BAD[i % 3]
    return x


def check() -> None:
    for kind in ("plain", "slice", "heads first"):
        for used in (None, torch.tensor([1, 0, 4], dtype=torch.int32)):
            layout = Layout(torch.tensor([0, 2, 2, 7]).int(), torch.tensor([0, 3, 4, 8]).int(), 5, 4, used)
            unused = [] if used is None else [1, 2, 3]
            cases = (
                (spoil(rows(10, 4, 8, kind), [7, 9, 8]), [7, 8, 9]),
                (spoil(rows(10, 4, 16, kind), [9]), [7, 8, 9]),
                (spoil(rows(13, 2, 8, kind), [*unused, 8, 12]), [*unused, 8, 9, 10, 11, 12]),
                (spoil(rows(13, 2, 16, kind), [12, *unused]), [*unused, 8, 9, 10, 11, 12]),
            )
            before = [x.clone() for x, _ in cases]
            q, g, k, v = (x for x, _ in cases)
            for after, (x, behind), old in zip(tails.finite_behind((q, g), (k, v), layout), cases, before):
                assert after.shape == x.shape
                assert after.isfinite().all()
                alive = [i for i in range(x.shape[0]) if i not in behind]
                assert torch.equal(after[alive], old[alive])
                assert torch.equal(after, torch.where(old.isfinite(), old, 0.0))
            assert len(tails.finite_behind((q,), (k, v), layout)) == 3


def check_sequences_are_left_alone() -> None:
    layout = Layout(torch.tensor([0, 2, 7]).int(), torch.tensor([0, 3, 8]).int(), 5, 5)
    q, k, v = (torch.full((n, 2, 8), math.nan) for n in (9, 11, 11))
    q, k, v = tails.finite_behind((q,), (k, v), layout)
    assert q[:7].isnan().all()
    assert k[:8].isnan().all()
    assert (q[7:] == 0).all()
    assert (v[8:] == 0).all()


def check_shared_rows() -> None:
    """What is written to a row that is another row, too, would show there."""
    layout = Layout(torch.tensor([0, 2]).int(), torch.tensor([0, 3]).int(), 2, 3)
    row = torch.full((1, 2, 8), math.inf)
    q, k, v = (row.expand(5, 2, 8) for _ in range(3))
    q, k, v = tails.finite_behind((q,), (k, v), layout)
    assert (row == math.inf).all()
    assert (q[:2] == math.inf).all()
    assert (q[2:] == 0).all()
    assert (k[3:] == 0).all()


def test_operations() -> None:
    check()
    check_sequences_are_left_alone()
    check_shared_rows()


def check_kernel() -> None:
    tails._with_triton = lambda x: True
    check()
    check_sequences_are_left_alone()
    check_shared_rows()


@needs_interpreter
def test_kernel() -> None:
    interpret("ops/backends/test_tails", "check_kernel")
