"""The rows behind the last sequence, by PyTorch operations and by the Triton kernels in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import run_python

from varlen_inductor.ops.backends import rows


def check() -> None:
    """Also run by itself, in a process where Triton interprets."""
    for tokens, end_q, end_k in ((5, 3, 5), (5, 5, 0), (3000, 2999, 7), (0, 0, 0)):
        cu_seq_q = torch.tensor([0, 2, end_q], dtype=torch.int32)
        cu_seq_k = torch.tensor([0, 2, end_k], dtype=torch.int32)
        out, lse = torch.full((tokens, 2, 8), math.nan), torch.zeros(2, tokens)
        out[:end_q], lse[:, end_q:] = 1.0, math.nan
        if end_q:
            lse[1, 0] = math.inf
        rows.finish_forward(out, lse, cu_seq_q)
        assert (out[:end_q] == 1.0).all()
        assert (out[end_q:] == 0.0).all()
        assert (lse[:, end_q:] == -math.inf).all()
        assert lse[:, :end_q].isinf().sum() == (1 if end_q else 0)

        grads = (torch.ones(tokens, 4, 8), torch.ones(tokens, 2, 8), torch.ones(tokens, 2, 16))
        rows.finish_backward(grads, cu_seq_q, cu_seq_k)
        for grad, end in zip(grads, (end_q, end_k, end_k)):
            assert (grad[:end] == 1.0).all()
            assert (grad[end:] == 0.0).all()


def test_operations() -> None:
    check()


@pytest.mark.skipif(rows.triton is None, reason="needs Triton")
def test_kernels() -> None:
    run_python(
        """
        import sys
        sys.path[:0] = ["tests", "tests/ops/backends"]
        import test_rows
        from varlen_inductor.ops.backends import rows
        rows._with_triton = lambda x: True
        test_rows.check()
        """,
        TRITON_INTERPRET="1",
    )
