"""Rows behind sequences, by PyTorch operations and by the Triton kernel in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from triton_interpreter import interpret, needs_interpreter
from varlen_inductor.ops.backends import tails
from varlen_inductor.ops.problem import Layout

BAD = (math.nan, math.inf, -math.inf)
NAN_WITH_A_MESSAGE = {torch.float32: (torch.int32, 0x7FC01234), torch.bfloat16: (torch.int16, 0x7FC5)}


def layout(ends_q: tuple[int, ...], ends_k: tuple[int, ...], **options: bool) -> Layout:
    return Layout(torch.tensor(ends_q).int(), torch.tensor(ends_k).int(), 9, 9, **options)


def rows(tokens: int, heads: int, dim: int, how: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(tokens, heads, dim, dtype=dtype)
    if how == "slice":
        return torch.randn(tokens, 3, heads, dim, dtype=dtype)[:, 1].copy_(x)
    return torch.randn(heads, tokens, dim, dtype=dtype).transpose(0, 1).copy_(x) if how == "heads first" else x


def spoil(x: Tensor, behind: list[int]) -> Tensor:
    for i, row in enumerate(behind):
        x[row, i % x.shape[1], i % x.shape[2]] = BAD[i % 3]
    bits, message = NAN_WITH_A_MESSAGE[x.dtype]
    x.view(bits)[behind[0], -1, -1] = message
    return x


def bits(x: Tensor) -> Tensor:
    return x.view(NAN_WITH_A_MESSAGE[x.dtype][0]).clone()


def check() -> None:
    for how in ("plain", "slice", "heads first"):
        for dtype in (torch.float32, torch.bfloat16):
            cases = (
                spoil(rows(10, 4, 8, how, dtype), [7, 9, 8]),
                spoil(rows(10, 4, 16, how, dtype), [9]),
                spoil(rows(13, 2, 8, how, dtype), [8, 12]),
                spoil(rows(13, 2, 16, how, dtype), [12]),
            )
            held = [bits(x) for x in cases]
            k, v = cases[2:]
            for queries in (cases[:2], cases[:1]):
                expected = [torch.where(x.isfinite(), x, 0.0) for x in (*queries, k, v)]
                with tails.finite_behind(queries, (k, v), layout((0, 2, 2, 7), (0, 3, 4, 8))) as after:
                    assert len(after) == len(expected)
                    assert all(map(torch.equal, after, expected))
                assert all(map(torch.equal, map(bits, cases), held))


def check_sequences_are_left_alone() -> None:
    q, k, v = (torch.full((n, 2, 8), math.nan) for n in (9, 11, 11))
    with tails.finite_behind((q,), (k, v), layout((0, 2, 7), (0, 3, 8))) as (q, k, v):
        assert q[:7].isnan().all()
        assert k[:8].isnan().all()
        assert (q[7:] == 0).all()
        assert (v[8:] == 0).all()


def check_no_rows_behind() -> None:
    q, k, v = (torch.full((n, 2, 8), math.nan) for n in (7, 8, 8))
    with tails.finite_behind((q,), (k, v), layout((0, 7), (0, 8))) as operands:
        assert all(x.isnan().all() for x in operands)


def check_more_rows_than_are_reached() -> None:
    end, some = 3, 2 * tails.REACH
    q, k, v = (torch.full((some, 1, 8), math.nan) for _ in range(3))
    with tails.finite_behind((q, q), (k, k), layout((0, 3), (0, 3))) as operands:
        assert all((x[end : end + tails.REACH] == 0).all() for x in operands)
    assert all(x.isnan().all() for x in (q, k, v))


def check_shared_rows() -> None:
    """What is written to a row that is another row, too, would show there."""
    row = torch.full((1, 2, 8), math.inf)
    q, k, v = (row.expand(5, 2, 8) for _ in range(3))
    with tails.finite_behind((q,), (k, v), layout((0, 2), (0, 3))) as (q, k, _):
        assert (row == math.inf).all()
        assert (q[:2] == math.inf).all()
        assert (q[2:] == 0).all()
        assert (k[3:] == 0).all()


def check_what_fails() -> None:
    """The caller's rows are as they were also where the attention raises."""
    q = rows(5, 2, 8, "plain").index_fill_(0, torch.tensor([4]), math.nan)
    with pytest.raises(ValueError, match="attention"), tails.finite_behind((q,), (q, q), layout((0, 4), (0, 4))):
        raise ValueError("attention")
    assert q[4].isnan().all()


def check_all() -> None:
    check()
    check_sequences_are_left_alone()
    check_no_rows_behind()
    check_more_rows_than_are_reached()
    check_shared_rows()
    check_what_fails()


def test_operations() -> None:
    check_all()


def test_nothing_is_done_where_nobody_reads() -> None:
    q, k, v = (torch.full((5, 2, 8), math.nan) for _ in range(3))
    with tails.finite_behind((q,), (k, v), layout((0, 2), (0, 3), tails_unread=True)) as operands:
        assert all(x is y for x, y in zip(operands, (q, k, v)))
        assert all(x.isnan().all() for x in operands)


def check_kernel() -> None:
    tails._with_triton = lambda x: True
    check_all()


@needs_interpreter
def test_kernel() -> None:
    interpret("ops/backends/test_tails", "check_kernel")
