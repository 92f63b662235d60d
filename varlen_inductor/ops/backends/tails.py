"""Makes what lies behind sequences harmless, for kernels that read past the end of one.

Kernels that fetch whole blocks with Hopper's copy engine (TMA) read up to a block behind the last query or key of a sequence, and
multiply what they find with weights that are zero. The next sequence is harmless there. Rows that belong to no sequence may hold
anything, and 0 * NaN is NaN. So numbers that are not finite are replaced by zeros in the rows that a kernel may reach: behind the
last sequence, and behind the keys in use where ``seqused_k`` says how many those are.

With Triton this is done in place, by one small kernel: copies would cost a tenth of the attention. Those rows mean nothing to
anyone, what is finite in them is left alone, and nothing is written where they hold finite numbers. Without Triton, copies are
made.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton 3.6 evaluates annotations, so nothing but constexpr has one.)

from __future__ import annotations

import torch
from torch import Tensor

from varlen_inductor.ops.backends.launch import Launcher, kind
from varlen_inductor.ops.problem import Layout

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch without Triton
    triton = None

REACH = 256
"""So many rows behind a sequence at most are read; no kernel has larger blocks."""
PROGRAMS, PROGRAMS_EACH = 64, 8
"""So many programs share the rows behind the last sequence, or those of each sequence where every one has some."""
BLOCK = 1024


def finite_behind(queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], layout: Layout) -> tuple[Tensor, ...]:
    """``queries`` and ``keys``, one after the other, with no NaN and no infinity in rows that belong to no sequence.

    Args:
        queries: one or two tensors (T_q, H, D), whose rows ``cu_seq_q`` describes; the last dimension contiguous.
        keys: two tensors (T_k, H_k, D), whose rows ``cu_seq_k`` and ``seqused_k`` describe; the last dimension contiguous.
    """
    if not _with_triton(keys[0]):
        dead_q, dead_k = _dead(queries[0], layout.cu_seq_q, None), _dead(keys[0], layout.cu_seq_k, layout.seqused_k)
        cleaned = [x.masked_fill(dead_q[:, None, None] & ~x.isfinite(), 0.0) for x in queries]
        return *cleaned, *(x.masked_fill(dead_k[:, None, None] & ~x.isfinite(), 0.0) for x in keys)
    queries, keys = tuple(map(_own_rows, queries)), tuple(map(_own_rows, keys))
    _clean(queries, keys, layout)
    return *queries, *keys


def _dead(x: Tensor, ends: Tensor, used: Tensor | None) -> Tensor:
    """(T,) bool: the rows of ``x`` that belong to no sequence, or are unused keys of one."""
    row = torch.arange(x.shape[0], device=x.device)
    dead = row >= ends[-1]
    if used is None:
        return dead
    sequence = torch.searchsorted(ends[1:].contiguous(), row, right=True).clamp(max=used.shape[0] - 1)
    return dead | (row >= ends[sequence] + used[sequence])


def _own_rows(x: Tensor) -> Tensor:
    """``x``, or a copy if rows may share memory, for what is written to one row must not show in another."""
    rows, heads, dim = x.shape
    outer, inner = (x.stride(0), x.stride(1)) if x.stride(0) >= x.stride(1) else (x.stride(1), x.stride(0))
    inner_size = heads if x.stride(0) >= x.stride(1) else rows
    if inner >= dim and outer >= inner * (inner_size - 1) + dim:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _clean(queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], layout: Layout) -> None:
    first, last = queries[0], queries[-1]
    key, value = keys
    used = layout.seqused_k
    sequences = layout.cu_seq_q.shape[0] - 1
    strides = [stride for x in (first, last, key, value) for stride in (x.stride(0), x.stride(1))]
    numbers = (first.shape[0], key.shape[0], sequences, *strides)
    sizes = (first.shape[1], first.shape[2], last.shape[2], key.shape[1], key.shape[2], value.shape[2])
    pointers = (layout.cu_seq_q, layout.cu_seq_k, layout.cu_seq_k if used is None else used)
    tensors = (first, last, key, value)
    aligned = tuple(x.data_ptr() % 16 for x in (*tensors, *pointers))
    count, programs = (1, PROGRAMS) if used is None else (sequences + 1, PROGRAMS_EACH)
    compiled_for = (first.device, first.dtype, aligned, sizes, used is None, *map(kind, numbers))
    grid = (count, 2 + len(queries), programs)
    _launch(grid, compiled_for, *tensors, *pointers, *numbers, *sizes, used is not None, REACH, BLOCK)


def _with_triton(x: Tensor) -> bool:
    return triton is not None and x.is_cuda


if triton is not None:

    @triton.jit
    def _clean_rows(
        x, start, stop, row_stride, head_stride, HEADS: tl.constexpr, DIM: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr
    ):
        stop = tl.minimum(stop, start + REACH)
        for row in range(start + tl.program_id(2), stop, tl.num_programs(2)):
            for at in range(0, HEADS * DIM, BLOCK):
                column = at + tl.arange(0, BLOCK)
                inside = column < HEADS * DIM
                head = column // DIM
                place = x + tl.cast(row, tl.int64) * row_stride + head.to(tl.int64) * head_stride + column % DIM
                number = tl.load(place, mask=inside, other=0.0).to(tl.float32)
                finite = tl.abs(number) < float("inf")  # false for NaN, too
                tl.store(place, tl.zeros((BLOCK,), x.dtype.element_ty), mask=inside & (finite == 0))

    @triton.jit
    def _clean_kernel(
        query,
        grad,
        key,
        value,
        ends_q,
        ends_k,
        used,
        rows_q,
        rows_k,
        sequences,
        stride_query_row,
        stride_query_head,
        stride_grad_row,
        stride_grad_head,
        stride_key_row,
        stride_key_head,
        stride_value_row,
        stride_value_head,
        HEADS: tl.constexpr,
        DIM: tl.constexpr,
        DIM_GRAD: tl.constexpr,
        HEADS_K: tl.constexpr,
        DIM_K: tl.constexpr,
        DIM_V: tl.constexpr,
        USED: tl.constexpr,
        REACH: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sequence, which = tl.program_id(0), tl.program_id(1)
        if which < 2:
            start = tl.load(ends_k + sequences)
            stop = rows_k
            if USED:  # noqa: SIM102  (known when compiled: without, `used` is no such thing)
                if sequence < sequences:
                    begin = tl.load(ends_k + sequence)
                    stop = tl.load(ends_k + sequence + 1)
                    start = tl.minimum(begin + tl.load(used + sequence), stop)
            if which == 0:
                _clean_rows(key, start, stop, stride_key_row, stride_key_head, HEADS_K, DIM_K, REACH, BLOCK)
            else:
                _clean_rows(value, start, stop, stride_value_row, stride_value_head, HEADS_K, DIM_V, REACH, BLOCK)
        elif sequence == 0:
            start = tl.load(ends_q + sequences)
            if which == 2:
                _clean_rows(query, start, rows_q, stride_query_row, stride_query_head, HEADS, DIM, REACH, BLOCK)
            else:
                _clean_rows(grad, start, rows_q, stride_grad_row, stride_grad_head, HEADS, DIM_GRAD, REACH, BLOCK)

    _launch = Launcher(_clean_kernel)
