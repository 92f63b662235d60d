"""The rows behind the last sequence, by PyTorch operations and by the Triton kernels in Triton's interpreter."""

from __future__ import annotations

import math

import torch

from triton_interpreter import interpret, needs_interpreter
from varlen_inductor.ops.backends import rows


def check() -> None:
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

        joined = torch.ones(tokens, 90)
        apart = (torch.ones(tokens, 4, 8), torch.ones(tokens, 2, 8), torch.ones(tokens, 2, 16))
        columns = tuple(x.unflatten(1, (-1, dim)) for x, dim in zip(joined.split([32, 16, 32, 10], 1), (8, 8, 16)))
        for grads in (apart, (columns[0], columns[1], columns[2])):
            rows.finish_backward(grads, cu_seq_q, cu_seq_k)
            for grad, end in zip(grads, (end_q, end_k, end_k)):
                assert (grad[:end] == 1.0).all()
                assert (grad[end:] == 0.0).all()
        assert (joined[:, 80:] == 1.0).all()


def test_operations() -> None:
    check()


def check_kernels() -> None:
    rows._with_triton = lambda x: True
    check()


@needs_interpreter
def test_kernels() -> None:
    interpret("ops/backends/test_rows", "check_kernels")
