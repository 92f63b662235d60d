"""Overwrites the rows behind the last sequence, which kernels leave as the allocator gave them.

How many there are only the device knows. With Triton one small kernel reads the last offset and writes those rows alone;
without, PyTorch operations go over everything.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton 3.6 evaluates annotations, so nothing but constexpr has one.)

from __future__ import annotations

import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch without Triton
    triton = None

PROGRAMS = 128
BLOCK = 4096


def finish_forward(out: Tensor, lse: Tensor, cu_seq_q: Tensor) -> None:
    """In ``out`` (T_q, H, D) zeroes the rows behind the last sequence; in ``lse`` (H, T_q) makes them, and +inf, -inf."""
    if _with_triton(out):
        _finish_forward[(PROGRAMS,)](out, lse, cu_seq_q[-1:], out.shape[0], out.stride(0), lse.numel(), BLOCK=BLOCK)
        return
    behind = torch.arange(out.shape[0], device=out.device) >= cu_seq_q[-1]
    out.masked_fill_(behind[:, None, None], 0.0)
    lse.masked_fill_(behind | (lse == math.inf), -math.inf)


def finish_backward(grads: tuple[Tensor, Tensor, Tensor], cu_seq_q: Tensor, cu_seq_k: Tensor) -> None:
    """Zeroes the rows behind the last sequence in the gradients of query, key and value, which are contiguous."""
    grad_query, grad_key, grad_value = grads
    if _with_triton(grad_query):
        _finish_backward[(PROGRAMS,)](
            *grads,
            cu_seq_q[-1:],
            cu_seq_k[-1:],
            grad_query.shape[0],
            grad_key.shape[0],
            grad_query.stride(0),
            grad_key.stride(0),
            grad_value.stride(0),
            BLOCK=BLOCK,
        )
        return
    for grad, offsets in ((grad_query, cu_seq_q), (grad_key, cu_seq_k), (grad_value, cu_seq_k)):
        behind = torch.arange(grad.shape[0], device=grad.device) >= offsets[-1]
        grad.masked_fill_(behind[:, None, None], 0.0)


def _with_triton(x: Tensor) -> bool:
    return triton is not None and x.is_cuda


if triton is not None:

    @triton.jit
    def _zero_behind(x, end, rows, row_size, BLOCK: tl.constexpr):
        program, programs = tl.program_id(0), tl.num_programs(0)
        stop = rows.to(tl.int64) * row_size
        for start in range(tl.load(end).to(tl.int64) * row_size + program * BLOCK, stop, programs * BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(x + at, tl.zeros((BLOCK,), x.dtype.element_ty), mask=at < stop)

    @triton.jit
    def _finish_forward(out, lse, end, rows, row_size, lse_size, BLOCK: tl.constexpr):
        _zero_behind(out, end, rows, row_size, BLOCK)
        program, programs = tl.program_id(0), tl.num_programs(0)
        first_behind = tl.load(end)
        for start in range(program * BLOCK, lse_size, programs * BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(lse + at, mask=at < lse_size, other=0.0)
            dead = (at % rows >= first_behind) | (value == float("inf"))
            tl.store(lse + at, float("-inf"), mask=dead & (at < lse_size))

    @triton.jit
    def _finish_backward(
        grad_query,
        grad_key,
        grad_value,
        end_q,
        end_k,
        rows_q,
        rows_k,
        row_size_q,
        row_size_k,
        row_size_v,
        BLOCK: tl.constexpr,
    ):
        _zero_behind(grad_query, end_q, rows_q, row_size_q, BLOCK)
        _zero_behind(grad_key, end_k, rows_k, row_size_k, BLOCK)
        _zero_behind(grad_value, end_k, rows_k, row_size_v, BLOCK)
