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

from varlen_inductor.ops.backends.launch import Launcher, kind

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
        numbers = (out.shape[0], out.shape[1] * out.shape[2], out.stride(0), lse.numel(), cu_seq_q.shape[0] - 1)
        key = (out.device, out.dtype, cu_seq_q.data_ptr() % 16, *map(kind, numbers))
        _launch_forward((PROGRAMS, 1, 1), key, out, lse, cu_seq_q, *numbers, BLOCK)
        return
    behind = torch.arange(out.shape[0], device=out.device) >= cu_seq_q[-1]
    out.masked_fill_(behind[:, None, None], 0.0)
    lse.masked_fill_(behind | (lse == math.inf), -math.inf)


def finish_backward(grads: tuple[Tensor, Tensor, Tensor], cu_seq_q: Tensor, cu_seq_k: Tensor) -> None:
    """Zeroes the rows behind the last sequence in the gradients of query, key and value (T, H, D), whose heads are contiguous."""
    grad_query, grad_key, grad_value = grads
    if _with_triton(grad_query):
        rows = (grad_query.shape[0], grad_key.shape[0], cu_seq_q.shape[0] - 1)
        sizes = [x.shape[1] * x.shape[2] for x in grads]
        numbers = (*rows, *sizes, grad_query.stride(0), grad_key.stride(0), grad_value.stride(0))
        aligned = [x.data_ptr() % 16 for x in (*grads, cu_seq_q, cu_seq_k)]
        key = (grad_query.device, grad_query.dtype, *aligned, *map(kind, numbers))
        _launch_backward((PROGRAMS, 1, 1), key, *grads, cu_seq_q, cu_seq_k, *numbers, BLOCK)
        return
    for grad, offsets in ((grad_query, cu_seq_q), (grad_key, cu_seq_k), (grad_value, cu_seq_k)):
        behind = torch.arange(grad.shape[0], device=grad.device) >= offsets[-1]
        grad.masked_fill_(behind[:, None, None], 0.0)


def _with_triton(x: Tensor) -> bool:
    return triton is not None and x.is_cuda


if triton is not None:

    @triton.jit
    def _zero_behind(x, end, rows, row_size, stride, BLOCK: tl.constexpr):
        for row in range(tl.load(end) + tl.program_id(0), rows, tl.num_programs(0)):
            place = x + tl.cast(row, tl.int64) * stride
            for start in range(0, row_size, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(place + at, tl.zeros((BLOCK,), x.dtype.element_ty), mask=at < row_size)

    @triton.jit
    def _finish_forward(out, lse, ends, rows, row_size, stride, lse_size, sequences, BLOCK: tl.constexpr):
        end = ends + sequences
        _zero_behind(out, end, rows, row_size, stride, BLOCK)
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
        ends_q,
        ends_k,
        rows_q,
        rows_k,
        sequences,
        row_size_q,
        row_size_k,
        row_size_v,
        stride_q,
        stride_k,
        stride_v,
        BLOCK: tl.constexpr,
    ):
        _zero_behind(grad_query, ends_q + sequences, rows_q, row_size_q, stride_q, BLOCK)
        _zero_behind(grad_key, ends_k + sequences, rows_k, row_size_k, stride_k, BLOCK)
        _zero_behind(grad_value, ends_k + sequences, rows_k, row_size_v, stride_v, BLOCK)

    _launch_forward, _launch_backward = Launcher(_finish_forward), Launcher(_finish_backward)
