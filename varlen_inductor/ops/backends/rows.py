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

from varlen_inductor.ops.backends.launch import Launcher, kind, stream_of

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch without Triton
    triton = None

PROGRAMS = 128
BLOCK = 4096
BLOCK_LSE = 1024
_GRID = (PROGRAMS, 1, 1)


def finish_forward(out: Tensor, lse: Tensor, cu_seq_q: Tensor) -> None:
    """In ``out`` (T_q, H, D) zeroes the rows behind the last sequence; in ``lse`` (H, T_q) makes them, and +inf, -inf.

    Heads are contiguous in ``out``, and all of ``lse`` is.
    """
    if not _with_triton(out):
        behind = torch.arange(out.shape[0], device=out.device) >= cu_seq_q[-1]
        out.masked_fill_(behind[:, None, None], 0.0)
        lse.masked_fill_(behind | (lse == math.inf), -math.inf)
        return
    tokens, heads, dim = out.shape
    index, at, at_lse, size, stride = out.get_device(), out.data_ptr(), lse.data_ptr(), heads * dim, out.stride(0)
    numbers = (tokens, heads, size, stride)
    usual = not (at | at_lse | size | stride) & 15 and not (tokens | size | stride) >> 31
    key = (index, out.dtype, usual or (at & 15, at_lse & 15, *map(kind, numbers)))
    stream = stream_of(index)
    args = (*numbers, BLOCK, BLOCK_LSE)
    if stream is None or not _launch_forward.again(_GRID, key, stream, at, at_lse, last_address(cu_seq_q), *args):
        _launch_forward(_GRID, key, out, lse, cu_seq_q[-1:], *args)


def finish_backward(grads: tuple[Tensor, Tensor, Tensor], cu_seq_q: Tensor, cu_seq_k: Tensor) -> None:
    """Zeroes the rows behind the last sequence in the gradients of query, key and value (T, H, D), whose heads are contiguous."""
    grad_query, grad_key, grad_value = grads
    if not _with_triton(grad_query):
        for grad, offsets in ((grad_query, cu_seq_q), (grad_key, cu_seq_k), (grad_value, cu_seq_k)):
            behind = torch.arange(grad.shape[0], device=grad.device) >= offsets[-1]
            grad.masked_fill_(behind[:, None, None], 0.0)
        return
    addresses, numbers, variant = places_of(grads)
    index, rows, rows_k = grad_query.get_device(), grad_query.shape[0], grad_key.shape[0]
    key = (index, grad_query.dtype, variant, (rows | rows_k) >> 31 and (rows >> 31, rows_k >> 31))
    stream = stream_of(index)
    ends = (last_address(cu_seq_q), last_address(cu_seq_k))
    args = (*numbers, rows, rows_k, BLOCK)
    if stream is None or not _launch_backward.again(_GRID, key, stream, *addresses, *ends, *args):
        _launch_backward(_GRID, key, *grads, cu_seq_q[-1:], cu_seq_k[-1:], *args)


def places_of(grads: tuple[Tensor, Tensor, Tensor]) -> tuple[tuple[int, int, int], tuple[int, ...], bool | tuple[int, ...]]:
    """What kernels that zero rows of the gradients (T, H, D) are told, and what part of that they are compiled for.

    Returns:
        addresses: of each.
        numbers: in one row of each, then from one row of each to the next.
        variant: for a key; ``True`` where all are multiples of 16, and numbers fit 32 bits, so that it is cheap to tell.
    """
    a, b, c = grads
    at_a, at_b, at_c = addresses = (a.data_ptr(), b.data_ptr(), c.data_ptr())
    (_, heads, dim), (_, heads_k, dim_k), (_, heads_v, dim_v) = a.shape, b.shape, c.shape
    size_a, size_b, size_c, step_a, step_b, step_c = numbers = (
        *(heads * dim, heads_k * dim_k, heads_v * dim_v),
        *(a.stride(0), b.stride(0), c.stride(0)),
    )
    together = size_a | size_b | size_c | step_a | step_b | step_c
    usual = not (at_a | at_b | at_c | together) & 15 and not together >> 31
    return addresses, numbers, usual or (at_a & 15, at_b & 15, at_c & 15, *map(kind, numbers))


def last_address(ends: Tensor) -> int:
    """Of the last of the offsets ``ends`` (N + 1,), int32, in any strides: a kernel that is given it need not know how many are."""
    return ends.data_ptr() + 4 * (ends.numel() - 1) * ends.stride(0)


def _with_triton(x: Tensor) -> bool:
    return triton is not None and x.is_cuda


if triton is not None:
    # No kernel is compiled for a number of rows, or for the place of the last offset: a key then need not tell of them.

    @triton.jit
    def zero_behind(x, first, rows, row_size, stride, program, programs, BLOCK: tl.constexpr):
        """Rows ``first`` to ``rows`` of ``x``, ``stride`` apart and of ``row_size`` numbers, shared by ``programs`` programs."""
        for row in range(first + program, rows, programs):
            place = x + tl.cast(row, tl.int64) * stride
            for start in range(0, row_size, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(place + at, tl.zeros((BLOCK,), x.dtype.element_ty), mask=at < row_size)

    @triton.jit
    def empty_lse_behind(lse, first, rows, heads, program, programs, BLOCK: tl.constexpr):
        """Of ``lse`` (heads, rows), shared by ``programs`` programs, rows from ``first`` on become -inf; no other is looked at."""
        for start in range(first, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            for head in range(program, heads, programs):
                tl.store(lse + tl.cast(head, tl.int64) * rows + row, float("-inf"), mask=row < rows)

    @triton.jit
    def finish_lse(lse, first, rows, heads, program, programs, BLOCK: tl.constexpr):
        """Of ``lse`` (heads, rows), shared by ``programs`` programs, rows from ``first`` on become -inf, and so does +inf."""
        blocks = tl.cdiv(rows, BLOCK)
        for i in range(program, heads * blocks, programs):
            row = i % blocks * BLOCK + tl.arange(0, BLOCK)
            place = lse + tl.cast(i // blocks, tl.int64) * rows + row
            value = tl.load(place, mask=row < rows, other=0.0)
            dead = (row >= first) | (value == float("inf"))
            tl.store(place, float("-inf"), mask=dead & (row < rows))

    @triton.jit(do_not_specialize=["rows", "heads"], do_not_specialize_on_alignment=["end"])
    def _finish_forward(out, lse, end, rows, heads, row_size, stride, BLOCK: tl.constexpr, BLOCK_LSE: tl.constexpr):
        program, programs, first = tl.program_id(0), tl.num_programs(0), tl.load(end)
        zero_behind(out, first, rows, row_size, stride, program, programs, BLOCK)
        finish_lse(lse, first, rows, heads, program, programs, BLOCK_LSE)

    @triton.jit(do_not_specialize=["rows_q", "rows_k"], do_not_specialize_on_alignment=["end_q", "end_k"])
    def _finish_backward(
        grad_query,
        grad_key,
        grad_value,
        end_q,
        end_k,
        row_size_q,
        row_size_k,
        row_size_v,
        stride_q,
        stride_k,
        stride_v,
        rows_q,
        rows_k,
        BLOCK: tl.constexpr,
    ):
        program, programs = tl.program_id(0), tl.num_programs(0)
        first_q, first_k = tl.load(end_q), tl.load(end_k)
        zero_behind(grad_query, first_q, rows_q, row_size_q, stride_q, program, programs, BLOCK)
        zero_behind(grad_key, first_k, rows_k, row_size_k, stride_k, program, programs, BLOCK)
        zero_behind(grad_value, first_k, rows_k, row_size_v, stride_v, program, programs, BLOCK)

    _launch_forward, _launch_backward = Launcher(_finish_forward), Launcher(_finish_backward)
