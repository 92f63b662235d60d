"""Makes what lies behind sequences harmless, for kernels that read past the end of one.

Kernels that fetch whole blocks with Hopper's copy engine (TMA) read up to a block behind the last query or key of a sequence, and
multiply what they find with weights that are zero. The next sequence is as good as any other finite numbers there. Rows behind
the last sequence may hold anything, and 0 * NaN is NaN. So numbers that are not finite are replaced by zeros in the rows there
that a kernel may reach, for as long as it runs. Rows inside a sequence that it does not use (``seqused_k``) are not looked at:
the backends that need this refuse such problems.

With Triton this is done in place: copies of the operands would cost a tenth of the attention. One small kernel in front keeps a
copy of those rows and puts zeros where numbers are not finite; one behind puts those numbers back, bit for bit. Both run on the
stream of the attention, and write nothing to rows that hold finite numbers. The one behind can also finish what the attention
leaves in its results there (`rows`), for each launch is a good part of what the host does. Without Triton, copies are made.

Usually there are no such rows, and what is left is the time of two launches that find that out. A forward that replaces the scores
of keys behind a sequence, and that stores no rows of queries there, needs no more hidden than value: `hide_value`. On Hopper the
kernel behind it is started while the attention still ends; it looks at the offsets, which nothing writes any more by then, and
waits for the rest.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton 3.6 evaluates annotations, so nothing but constexpr has one.)

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from varlen_inductor.ops.backends.launch import Launcher, gdc_wait, kind, starts_early, stream_of
from varlen_inductor.ops.backends.order import Order, empty_order, lengths_at_once
from varlen_inductor.ops.backends.rows import BLOCK as BLOCK_ROWS
from varlen_inductor.ops.backends.rows import BLOCK_LSE, finish_backward, finish_forward, last_address, places_of
from varlen_inductor.ops.problem import Layout

try:
    import triton
    import triton.language as tl

    from varlen_inductor.ops.backends.order import write_order
    from varlen_inductor.ops.backends.rows import empty_lse_behind, zero_behind
except ImportError:  # PyTorch without Triton
    triton = None

REACH = 256
"""So many rows behind a sequence at most are read; no kernel has larger blocks."""
PROGRAMS = 64
"""So many programs share the rows of a tensor."""
BLOCK = 1024
_GRID, _GRID_GRAD = (3, PROGRAMS, 1), (4, PROGRAMS, 1)
_GRID_BACKWARD = (6, PROGRAMS, 1)
"""As many programs finish the gradients as exchange the rows of two tensors."""
_GRID_VALUE = (1, PROGRAMS, 1)
"""In a forward each program has its part of everything: they are fewer than a device runs at once."""


class Hidden(NamedTuple):
    """What `hide` or `hide_value` did, and what undoes it."""

    operands: tuple[Tensor, ...]
    """To be read, the caller's, or copies without Triton: ``query``, ``grad_out`` (or ``query`` again), ``key`` and ``value``; or
    ``value`` alone."""
    layout: Layout
    ends: tuple[Tensor, ...]
    """The offsets whose last ones the kernels read."""
    kept: Tensor | None
    """The rows behind the last sequence as they were, or ``None`` without Triton."""
    grid: tuple[int, int, int]
    """Of the kernels that only exchange rows."""
    key: tuple[object, ...]
    stream: int | None
    """The number of the stream if the operands' device is the current one."""
    args: tuple[int, ...]
    """Of every kernel: the addresses of `tensors`, numbers that may change from call to call, then constants."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In place of the addresses, which are not enough for a first launch."""
        assert self.kept is not None
        return *self.operands, self.kept, *(offsets[-1:] for offsets in self.ends)


def hide(query: Tensor, grad_out: Tensor | None, key: Tensor, value: Tensor, layout: Layout) -> Hidden:
    """Takes NaN and infinity out of the rows behind the last sequence, until `put_back` or `restore_backward`.

    One of them must follow, whatever happens in between. Each row has memory of its own (`own_rows`), with the last dimension
    contiguous; the operands are on one device and of one dtype.

    Args:
        query: shape (T_q, H, D).
        grad_out: shape (T_q, H, D_v), if it is read, too.
        key: shape (T_k, H_k, D).
        value: shape (T_k, H_k, D_v).
    """
    if not _with_triton(key):
        ends_q, ends_k = layout.cu_seq_q, layout.cu_seq_k
        query, key, value = _cleaned(query, ends_q), _cleaned(key, ends_k), _cleaned(value, ends_k)
        grad_out = query if grad_out is None else _cleaned(grad_out, ends_q)
        return Hidden((query, grad_out, key, value), layout, (ends_q, ends_k), None, _GRID, (), None, ())
    rows, heads, dim = query.shape
    rows_k, heads_k, dim_v = value.shape
    at_q, at_k, at_v = query.data_ptr(), key.data_ptr(), value.data_ptr()
    row_q, head_q, _ = query.stride()
    row_k, head_k, _ = key.stride()
    row_v, head_v, _ = value.stride()
    if grad_out is None:
        grid, grad_out, dims, at_g, row_g, head_g = _GRID, query, dim, at_q, row_q, head_q  # no program looks at it
    else:
        grid, dims, at_g, (row_g, head_g, _) = _GRID_GRAD, dim + dim_v, grad_out.data_ptr(), grad_out.stride()
    kept = query.new_empty(min(rows, REACH) * heads * dims + min(rows_k, REACH) * heads_k * (dim + dim_v))
    at = kept.data_ptr()
    cu_seq_q, cu_seq_k = layout.cu_seq_q, layout.cu_seq_k
    end_q = last_address(cu_seq_q)
    end_k = end_q if cu_seq_k is cu_seq_q else last_address(cu_seq_k)
    addresses = (at_q, at_g, at_k, at_v, at, end_q, end_k)
    numbers = (rows, rows_k, row_q, head_q, row_g, head_g, row_k, head_k, row_v, head_v)
    strides = row_q | head_q | row_g | head_g | row_k | head_k | row_v | head_v
    # Heads of 16 and more numbers, nearly always; to look at each by itself would take as long as all the rest.
    usual = not (at_q | at_g | at_k | at_v | at | strides) & 15 and not (strides | rows | rows_k) >> 31
    index = query.get_device()
    variant = usual or (at_q & 15, at_g & 15, at_k & 15, at_v & 15, at & 15, *map(kind, numbers))
    compiled_for = (index, query.dtype, heads, dim, heads_k, dim_v, variant)
    args = (*addresses, *numbers, heads, dim, heads_k, dim_v, REACH, BLOCK)
    stream = stream_of(index)
    hidden = Hidden((query, grad_out, key, value), layout, (cu_seq_q, cu_seq_k), kept, grid, compiled_for, stream, args)
    if stream is None or not _launch_hide.again(grid, compiled_for, stream, *args, False):
        _launch_hide(grid, compiled_for, *hidden.tensors, *args[7:], False)
    return hidden


def put_back(hidden: Hidden) -> None:
    """The caller's tensors hold again, bit for bit, what they held."""
    _, _, _, kept, grid, key, stream, args = hidden
    if kept is not None and (stream is None or not _launch_put_back.again(grid, key, stream, *args, True)):
        _launch_put_back(grid, key, *hidden.tensors, *args[7:], True)


def restore_backward(hidden: Hidden, grads: tuple[Tensor, Tensor, Tensor]) -> None:
    """`put_back` and `rows.finish_backward` in one launch, where rows were hidden with ``grad_out``.

    Args:
        grads: of query (T_q, H, D), key (T_k, H_k, D) and value (T_k, H_k, D_v), in the dtype of the operands. Heads are
            contiguous, rows need not be, and head dims may be smaller than those of the operands.
    """
    layout = hidden.layout
    if hidden.kept is None:
        finish_backward(grads, layout.cu_seq_q, layout.cu_seq_k)
        return
    *_, key, stream, args = hidden
    addresses, numbers, variant = places_of(grads)
    key = (key, variant)
    if stream is None or not _launch_restore_backward.again(_GRID_BACKWARD, key, stream, *addresses, *numbers, *args, BLOCK_ROWS):
        _launch_restore_backward(_GRID_BACKWARD, key, *grads, *numbers, *hidden.tensors, *args[7:], BLOCK_ROWS)


def hide_value(value: Tensor, layout: Layout, ordering: bool = False) -> tuple[Hidden, Order | None]:
    """Takes NaN and infinity out of the rows of ``value`` behind the last sequence, until `restore_forward`, which must follow.

    Args:
        value: shape (T_k, H_k, D_v). Each row has memory of its own (`own_rows`), with the last dimension contiguous.
        ordering: with Triton, also find the order of sequences, if there may be one.
    """
    if not _with_triton(value):
        return Hidden((_cleaned(value, layout.cu_seq_k),), layout, (layout.cu_seq_k,), None, _GRID_VALUE, (), None, ()), None
    rows, heads, dim = value.shape
    row, head, _ = value.stride()
    kept = value.new_empty(min(rows, REACH) * heads * dim)
    at, at_kept, index = value.data_ptr(), kept.data_ptr(), value.get_device()
    usual = not (at | at_kept | row | head) & 15 and not (row | head | rows) >> 31
    key = (index, value.dtype, heads, dim, usual or (at & 15, at_kept & 15, *map(kind, (rows, row, head))))
    stream = stream_of(index)
    args = (at, at_kept, last_address(layout.cu_seq_k), rows, row, head, heads, dim, REACH, BLOCK)
    hidden = Hidden((value,), layout, (layout.cu_seq_k,), kept, _GRID_VALUE, key, stream, args)
    order = empty_order(layout, value) if ordering else None
    cu_q, cu_k = layout.cu_seq_q, layout.cu_seq_k
    offsets = (cu_q, cu_k, *(order or (cu_q, cu_q, cu_k, cu_k)))  # without an order nothing is written there
    addresses, sequences = [x.data_ptr() for x in offsets], cu_q.shape[0] - 1
    apart = order is not None and order.starts_q is not order.starts_k
    most = 0 if order is None else lengths_at_once(sequences)
    variant = (key, apart, most)
    if stream is None or not _launch_hide_value.again(_GRID_VALUE, variant, stream, *addresses, sequences, *args, apart, most):
        _launch_hide_value(_GRID_VALUE, variant, *offsets, sequences, *hidden.tensors, *args[3:], apart, most, num_warps=1)
    return hidden, order


def restore_forward(hidden: Hidden, out: Tensor, lse: Tensor) -> None:
    """Puts the rows of value back, bit for bit; behind the last sequence ``out`` becomes zero, and ``lse`` -inf. One launch.

    Args:
        hidden: of `hide_value`.
        out: shape (T_q, H, D_v), contiguous, in the dtype of value.
        lse: shape (H, T_q), float32, contiguous.
    """
    if hidden.kept is None:
        finish_forward(out, lse, hidden.layout.cu_seq_q)
        return
    layout, (*_, key, stream, args) = hidden.layout, hidden
    rows, heads, _ = out.shape
    at, at_lse = out.data_ptr(), lse.data_ptr()
    usual = not (at | at_lse) & 15 and not rows >> 31
    key = (key, heads, usual or (at & 15, at_lse & 15, kind(rows)))
    early = starts_early(out.get_device())
    addresses, more = (at, at_lse, last_address(layout.cu_seq_q)), (heads, BLOCK_ROWS, BLOCK_LSE, early)
    if stream is None or not _launch_restore_forward.again(_GRID_VALUE, key, stream, *addresses, rows, *args, *more):
        arguments = (out, lse, layout.cu_seq_q[-1:], rows, *hidden.tensors, *args[3:], *more)
        _launch_restore_forward(_GRID_VALUE, key, *arguments, **({"launch_pdl": True} if early else {}))


@contextmanager
def finite_behind(queries: tuple[Tensor, ...], keys: tuple[Tensor, Tensor], layout: Layout) -> Iterator[tuple[Tensor, ...]]:
    """``queries`` and ``keys``, one after the other, with no NaN and no infinity behind the last sequence inside of the context.

    What the caller's tensors hold is the same before and after. With ``layout.tails_unread`` their rows there hold finite numbers
    already, if there are any.

    Args:
        queries: query (T_q, H, D), and the gradient of the result (T_q, H, D_v) if it is read, too; the last dimension contiguous.
        keys: key (T_k, H_k, D) and value (T_k, H_k, D_v); the last dimension contiguous.
    """
    query, *grad_out, key, value = map(own_rows, (*queries, *keys))
    if layout.tails_unread:
        yield query, *grad_out, key, value
        return
    hidden = hide(query, grad_out[0] if grad_out else None, key, value, layout)
    try:
        yield *hidden.operands[: len(queries)], *hidden.operands[2:]
    finally:
        put_back(hidden)


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


def _with_triton(x: Tensor) -> bool:
    return triton is not None and x.is_cuda


if triton is not None:
    # No kernel is compiled for a number of rows, or for the place of the last offset: then it is nearly always the same one.
    _OFFSETS = ["end_q", "end_k", "cu_q", "cu_k", "starts_q", "used_q", "starts_k", "used_k"]
    _any_rows = triton.jit(do_not_specialize=["rows_q", "rows_k", "sequences"], do_not_specialize_on_alignment=_OFFSETS)

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
    def _exchange(
        which,
        query,
        grad,
        key,
        value,
        kept,
        end_q,
        end_k,
        rows_q,
        rows_k,
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
        HEADS_K: tl.constexpr,
        DIM_V: tl.constexpr,
        PUTTING_BACK: tl.constexpr,
        REACH: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One of the four tensors."""
        kept_value = kept + tl.minimum(rows_k, REACH) * (HEADS_K * DIM)
        kept_query = kept_value + tl.minimum(rows_k, REACH) * (HEADS_K * DIM_V)
        kept_grad = kept_query + tl.minimum(rows_q, REACH) * (HEADS * DIM)
        first_q, first_k = tl.load(end_q), tl.load(end_k)
        if which == 0:
            _exchange_rows(key, kept, first_k, rows_k, stride_key_row, stride_key_head, HEADS_K, DIM, PUTTING_BACK, REACH, BLOCK)
        elif which == 1:
            _exchange_rows(
                value, kept_value, first_k, rows_k, stride_value_row, stride_value_head, HEADS_K, DIM_V, PUTTING_BACK, REACH, BLOCK
            )
        elif which == 2:
            _exchange_rows(
                query, kept_query, first_q, rows_q, stride_query_row, stride_query_head, HEADS, DIM, PUTTING_BACK, REACH, BLOCK
            )
        else:
            _exchange_rows(
                grad, kept_grad, first_q, rows_q, stride_grad_row, stride_grad_head, HEADS, DIM_V, PUTTING_BACK, REACH, BLOCK
            )

    @_any_rows
    def _exchange_kernel(
        query,
        grad,
        key,
        value,
        kept,
        end_q,
        end_k,
        rows_q,
        rows_k,
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
        HEADS_K: tl.constexpr,
        DIM_V: tl.constexpr,
        REACH: tl.constexpr,
        BLOCK: tl.constexpr,
        PUTTING_BACK: tl.constexpr,
    ):
        which = tl.program_id(0)
        _exchange(
            which,
            query,
            grad,
            key,
            value,
            kept,
            end_q,
            end_k,
            rows_q,
            rows_k,
            stride_query_row,
            stride_query_head,
            stride_grad_row,
            stride_grad_head,
            stride_key_row,
            stride_key_head,
            stride_value_row,
            stride_value_head,
            HEADS,
            DIM,
            HEADS_K,
            DIM_V,
            PUTTING_BACK,
            REACH,
            BLOCK,
        )

    @_any_rows
    def _hide_value_kernel(
        cu_q,
        cu_k,
        starts_q,
        used_q,
        starts_k,
        used_k,
        sequences,
        value,
        kept,
        end_k,
        rows_k,
        stride_value_row,
        stride_value_head,
        HEADS_K: tl.constexpr,
        DIM_V: tl.constexpr,
        REACH: tl.constexpr,
        BLOCK: tl.constexpr,
        APART: tl.constexpr,
        MOST: tl.constexpr,
    ):
        first = tl.load(end_k)
        if MOST > 0:
            program, programs = tl.program_id(1), tl.num_programs(1)
            write_order(cu_q, cu_k, starts_q, used_q, starts_k, used_k, sequences, program, programs, APART, MOST)
        _exchange_rows(value, kept, first, rows_k, stride_value_row, stride_value_head, HEADS_K, DIM_V, False, REACH, BLOCK)

    @_any_rows
    def _restore_forward_kernel(
        out,
        lse,
        end_q,
        rows_q,
        value,
        kept,
        end_k,
        rows_k,
        stride_value_row,
        stride_value_head,
        HEADS_K: tl.constexpr,
        DIM_V: tl.constexpr,
        REACH: tl.constexpr,
        BLOCK: tl.constexpr,
        HEADS: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_LSE: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        first_q, first_k = tl.load(end_q), tl.load(end_k)
        if EARLY:
            gdc_wait()
        if (first_q < rows_q) | (first_k < rows_k):  # one jump over all of it, usually
            _exchange_rows(value, kept, first_k, rows_k, stride_value_row, stride_value_head, HEADS_K, DIM_V, True, REACH, BLOCK)
            program, programs = tl.program_id(1), tl.num_programs(1)
            zero_behind(out, first_q, rows_q, HEADS * DIM_V, HEADS * DIM_V, program, programs, BLOCK_ROWS)
            empty_lse_behind(lse, first_q, rows_q, HEADS, program, programs, BLOCK_LSE)

    @_any_rows
    def _restore_backward_kernel(
        grad_query,
        grad_key,
        grad_value,
        row_size_q,
        row_size_k,
        row_size_v,
        stride_q,
        stride_k,
        stride_v,
        query,
        grad,
        key,
        value,
        kept,
        end_q,
        end_k,
        rows_q,
        rows_k,
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
        HEADS_K: tl.constexpr,
        DIM_V: tl.constexpr,
        REACH: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
    ):
        which = tl.program_id(0)
        if which < 4:
            _exchange(
                which,
                query,
                grad,
                key,
                value,
                kept,
                end_q,
                end_k,
                rows_q,
                rows_k,
                stride_query_row,
                stride_query_head,
                stride_grad_row,
                stride_grad_head,
                stride_key_row,
                stride_key_head,
                stride_value_row,
                stride_value_head,
                HEADS,
                DIM,
                HEADS_K,
                DIM_V,
                True,
                REACH,
                BLOCK,
            )
        else:
            program = (which - 4) * tl.num_programs(1) + tl.program_id(1)
            programs = (tl.num_programs(0) - 4) * tl.num_programs(1)
            first_q, first_k = tl.load(end_q), tl.load(end_k)
            zero_behind(grad_query, first_q, rows_q, row_size_q, stride_q, program, programs, BLOCK_ROWS)
            zero_behind(grad_key, first_k, rows_k, row_size_k, stride_k, program, programs, BLOCK_ROWS)
            zero_behind(grad_value, first_k, rows_k, row_size_v, stride_v, program, programs, BLOCK_ROWS)

    _launch_hide, _launch_put_back = Launcher(_exchange_kernel), Launcher(_exchange_kernel)
    _launch_hide_value, _launch_restore_forward = Launcher(_hide_value_kernel), Launcher(_restore_forward_kernel)
    _launch_restore_backward = Launcher(_restore_backward_kernel)
