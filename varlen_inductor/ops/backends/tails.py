"""Makes what lies behind sequences harmless, for kernels that read past the end of one.

Kernels that fetch whole blocks with Hopper's copy engine (TMA) read up to a block behind the last query or key of a sequence, and
multiply what they find with weights that are zero. The next sequence is as good as any other finite numbers there. Rows behind
the last sequence may hold anything, and 0 * NaN is NaN. So numbers that are not finite are replaced by zeros in the rows there
that a kernel may reach, for as long as it runs. Rows inside a sequence that it does not use (``seqused_k``) are not looked at:
the backends that need this refuse such problems.

With Triton this is done in place: copies of the operands would cost a tenth of the attention. One small kernel in front keeps a
copy of those rows and puts zeros where numbers are not finite; one behind puts those numbers back, bit for bit. Both run on the
stream of the attention, and write nothing to rows that hold finite numbers. Without Triton, copies are made.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton 3.6 evaluates annotations, so nothing but constexpr has one.)

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
PROGRAMS = 64
"""So many programs share the rows of a tensor."""
BLOCK = 1024


@contextmanager
def finite_behind(queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], layout: Layout) -> Iterator[tuple[Tensor, ...]]:
    """``queries`` and ``keys``, one after the other, with no NaN and no infinity behind the last sequence inside of the context.

    What the caller's tensors hold is the same before and after. With ``layout.tails_unread`` their rows there hold finite numbers
    already, if there are any.

    Args:
        queries: one or two tensors (T_q, H, D), whose rows ``cu_seq_q`` describes; the last dimension contiguous.
        keys: two tensors (T_k, H_k, D), whose rows ``cu_seq_k`` describes; the last dimension contiguous.
    """
    if layout.tails_unread:
        yield *map(own_rows, queries), *map(own_rows, keys)
    elif not _with_triton(keys[0]):
        yield *(_cleaned(x, layout.cu_seq_q) for x in queries), *(_cleaned(x, layout.cu_seq_k) for x in keys)
    else:
        queries, keys = tuple(map(own_rows, queries)), tuple(map(own_rows, keys))
        put_back = _hide(queries, keys, layout)
        try:
            yield *queries, *keys
        finally:
            put_back()


def own_rows(x: Tensor) -> Tensor:
    """``x`` (T, H, D), or a copy if rows may share memory, for what is written to one row must not show in another."""
    rows, heads, dim = x.shape
    outer, inner = (x.stride(0), x.stride(1)) if x.stride(0) >= x.stride(1) else (x.stride(1), x.stride(0))
    inner_size = heads if x.stride(0) >= x.stride(1) else rows
    if inner >= dim and outer >= inner * (inner_size - 1) + dim:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _cleaned(x: Tensor, ends: Tensor) -> Tensor:
    behind = torch.arange(x.shape[0], device=x.device) >= ends[-1]
    return x.masked_fill(behind[:, None, None] & ~x.isfinite(), 0.0)


def _hide(queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], layout: Layout) -> Callable[[], None]:
    """Puts zeros where numbers are not finite, and returns what puts the numbers back."""
    first, last = queries[0], queries[-1]
    key, value = keys
    tensors = (first, last, key, value)
    (rows, heads, dim), (rows_k, heads_k, dim_k) = first.shape, key.shape
    strides = [stride for x in tensors for stride in x.stride()[:2]]
    numbers = (rows, rows_k, layout.cu_seq_q.shape[0] - 1, *strides)
    sizes = (heads, dim, last.shape[2], heads_k, dim_k, value.shape[2])
    kept_q = heads * sum(x.shape[2] for x in queries)
    kept = first.new_empty(min(rows, REACH) * kept_q + min(rows_k, REACH) * heads_k * (dim_k + value.shape[2]))
    pointers = (*tensors, kept, layout.cu_seq_q, layout.cu_seq_k)
    compiled_for = (first.device, first.dtype, *(x.data_ptr() % 16 for x in pointers), sizes, *map(kind, numbers))
    grid = (2 + len(queries), PROGRAMS, 1)

    def launch(putting_back: bool) -> None:
        _launch(grid, (putting_back, compiled_for), *pointers, *numbers, *sizes, putting_back, REACH, BLOCK)

    launch(False)
    return lambda: launch(True)


def _with_triton(x: Tensor) -> bool:
    return triton is not None and x.is_cuda


if triton is not None:

    @triton.jit
    def _exchange_rows(
        x,
        kept,
        start,
        rows,
        row_stride,
        head_stride,
        HEADS: tl.constexpr,
        DIM: tl.constexpr,
        PUTTING_BACK: tl.constexpr,
        REACH: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        stop = tl.minimum(rows, start + REACH)
        for row in range(start + tl.program_id(1), stop, tl.num_programs(1)):
            for at in range(0, HEADS * DIM, BLOCK):
                column = at + tl.arange(0, BLOCK)
                inside = column < HEADS * DIM
                head = column // DIM
                place = x + tl.cast(row, tl.int64) * row_stride + head.to(tl.int64) * head_stride + column % DIM
                copy = kept + (row - start) * (HEADS * DIM) + column
                number = tl.load(copy if PUTTING_BACK else place, mask=inside, other=0.0)
                finite = tl.abs(number.to(tl.float32)) < float("inf")  # false for NaN, too
                if PUTTING_BACK:
                    tl.store(place, number, mask=inside & (finite == 0))
                else:
                    tl.store(copy, number, mask=inside)
                    tl.store(place, tl.zeros((BLOCK,), x.dtype.element_ty), mask=inside & (finite == 0))

    @triton.jit
    def _exchange_kernel(
        query,
        grad,
        key,
        value,
        kept,
        ends_q,
        ends_k,
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
        PUTTING_BACK: tl.constexpr,
        REACH: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        which = tl.program_id(0)
        kept_value = kept + tl.minimum(rows_k, REACH) * (HEADS_K * DIM_K)
        kept_query = kept_value + tl.minimum(rows_k, REACH) * (HEADS_K * DIM_V)
        kept_grad = kept_query + tl.minimum(rows_q, REACH) * (HEADS * DIM)
        end_q, end_k = tl.load(ends_q + sequences), tl.load(ends_k + sequences)
        if which == 0:
            _exchange_rows(key, kept, end_k, rows_k, stride_key_row, stride_key_head, HEADS_K, DIM_K, PUTTING_BACK, REACH, BLOCK)
        elif which == 1:
            _exchange_rows(
                value, kept_value, end_k, rows_k, stride_value_row, stride_value_head, HEADS_K, DIM_V, PUTTING_BACK, REACH, BLOCK
            )
        elif which == 2:
            _exchange_rows(
                query, kept_query, end_q, rows_q, stride_query_row, stride_query_head, HEADS, DIM, PUTTING_BACK, REACH, BLOCK
            )
        else:
            _exchange_rows(
                grad, kept_grad, end_q, rows_q, stride_grad_row, stride_grad_head, HEADS, DIM_GRAD, PUTTING_BACK, REACH, BLOCK
            )

    _launch = Launcher(_exchange_kernel)
