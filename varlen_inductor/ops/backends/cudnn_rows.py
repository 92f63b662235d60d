"""What surrounds a cuDNN kernel, each in one launch: where its sequences lie, the layout of lse, and rows that it leaves alone.

cuDNN wants the offset of each sequence in elements, for each tensor, and its numbers of queries and keys. It writes lse with the
heads of a row side by side, (T, H), and nothing to rows outside of its sequences. A sequence without queries or without keys is
given to it as one with neither. Without Triton, PyTorch operations do the same.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton 3.6 evaluates annotations, so nothing but constexpr has one.)

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from varlen_inductor.ops.backends.cudnn_plan import OF_QUERIES, Plan
from varlen_inductor.ops.backends.launch import Launcher, kind
from varlen_inductor.ops.problem import UNBOUNDED, Layout

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch without Triton
    triton = None

SEQUENCES = 256
ROWS = 64
BLOCK = 1024
PROGRAMS = 16
_FAR = 2**30
"""A distance behind every key."""


class Places(NamedTuple):
    """Where the sequences lie, on the device, and what cuDNN gets of it."""

    buffer: Tensor
    """Owns the memory of all the pointers."""
    pointers: tuple[int, ...]
    """Of the offsets of each tensor in the plan's order, then of the numbers of queries and of keys."""
    workspace: int
    """The pointer of scratch memory for the plan."""


def place(plan: Plan, layout: Layout) -> Places:
    """Write down where the sequences lie, for a forward."""
    places = _new_places(plan, layout.cu_seq_q.device)
    if _with_triton(places.buffer):
        key = _place_key(plan, layout)
        _launch_place((-(-(plan.key.sequences + 1) // SEQUENCES), 1, 1), key, *_place_args(plan, layout, places))
    else:
        _place(plan, layout, places.buffer)
    return places


def place_backward(plan: Plan, layout: Layout, lse: Tensor) -> tuple[Places, Tensor]:
    """The same for a backward; also lse (H, T), as cuDNN reads it: (T, H), and +inf for a query that sees no key.

    Every weight is computed as exp(score - lse), so with +inf there is none, whatever became of the scores.
    """
    places = _new_places(plan, lse.device)
    heads, tokens = lse.shape
    if not _with_triton(lse):
        _place(plan, layout, places.buffer)
        return places, lse.masked_fill(lse == -math.inf, math.inf).t().contiguous()
    stats = lse.new_empty(tokens, heads)
    grid = (-(-(plan.key.sequences + 1) // SEQUENCES) - (-tokens // ROWS), 1, 1)
    *args, last = _place_args(plan, layout, places)
    numbers = (tokens, heads, _power_of_two(heads), ROWS)
    _launch_place_backward(grid, (*_place_key(plan, layout), kind(tokens)), *args, lse, stats, *numbers, last)
    return places, stats


def finish_forward(out: Tensor, stats: Tensor, layout: Layout, right: int) -> Tensor:
    """lse (H, T) of stats (T, H), -inf for queries that see no key, whose rows in ``out`` (T, H, D_v) become zeros.

    Rows behind the last sequence are such too, but are left alone where they are not read.

    Args:
        right: the right side of the window.
    """
    tokens, heads = stats.shape
    lse = stats.new_empty(heads, tokens)
    right = _FAR if right == UNBOUNDED else right
    sequences, tail = layout.cu_seq_q.shape[0] - 1, not layout.tails_unread
    if not _with_triton(out):
        dead = _queries_without_keys(layout, tokens, right)
        out.masked_fill_(dead[:, None, None], 0.0)
        return torch.where(dead[:, None], -math.inf, stats).t().contiguous()
    numbers = (sequences, tokens, heads * out.shape[2], right)
    constants = (heads, _power_of_two(heads), layout.seqused_k is not None, ROWS, BLOCK)
    kinds = (out.device, out.dtype, *_alignments(layout), *map(kind, numbers), *constants)
    grid = (sequences + tail, -(-max(layout.max_q, 1) // ROWS), 1)
    _launch_finish_forward(grid, kinds, out, stats, lse, *_ends(layout), *numbers, *constants)
    return lse


def finish_backward(grads: tuple[Tensor, Tensor, Tensor], layout: Layout, right: int) -> None:
    """Zeroes what has no gradient: queries that see no key, keys that are not used or have no query, rows behind the end."""
    grad_query, grad_key, grad_value = grads
    right = _FAR if right == UNBOUNDED else right
    if not _with_triton(grad_query):
        grad_query.masked_fill_(_queries_without_keys(layout, grad_query.shape[0], right)[:, None, None], 0.0)
        dead = _keys_without_queries(layout, grad_key.shape[0])[:, None, None]
        grad_key.masked_fill_(dead, 0.0)
        grad_value.masked_fill_(dead, 0.0)
        return
    sequences = layout.cu_seq_q.shape[0] - 1
    rows = (grad_query.shape[0], grad_key.shape[0])
    numbers = (sequences, *rows, grad_query.stride(0), grad_key.stride(0), grad_value.stride(0), right)
    constants = (layout.seqused_k is not None, BLOCK)
    kinds = (grad_query.device, grad_query.dtype, *_alignments(layout), *map(kind, numbers), *constants)
    grid = (sequences + (not layout.tails_unread), PROGRAMS, 1)
    _launch_finish_backward(grid, kinds, *grads, *_ends(layout), *numbers, *constants)


def _with_triton(x: Tensor) -> bool:
    return triton is not None and x.is_cuda


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _ends(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """``cu_seq_q``, ``cu_seq_k`` and ``seqused_k``, or something in its place that is not read."""
    used = layout.cu_seq_k if layout.seqused_k is None else layout.seqused_k
    return layout.cu_seq_q, layout.cu_seq_k, used


def _alignments(layout: Layout) -> tuple[int, ...]:
    return tuple(x.data_ptr() % 16 for x in _ends(layout))


# --- places ----------------------------------------------------------------------------------------------------------


def _pitch(plan: Plan) -> int:
    return -(-(plan.key.sequences + 1) // 4) * 4  # cuDNN's pointers are multiples of 16 bytes


def _new_places(plan: Plan, device: torch.device) -> Places:
    """An int32 buffer: the workspace, then rows of ``_pitch`` numbers: of queries, of keys, and offsets, which may be wide."""
    row = 4 * _pitch(plan)
    step = 2 * row if plan.key.wide else row
    workspace, count = _workspace(plan), len(plan.names)
    buffer = torch.empty((workspace + 2 * row + count * step) // 4, dtype=torch.int32, device=device)
    start = buffer.data_ptr()
    lengths = start + workspace
    offsets = lengths + 2 * row
    return Places(buffer, (*range(offsets, offsets + count * step, step), lengths, lengths + row), start)


def _workspace(plan: Plan) -> int:
    """The bytes of the workspace, rounded up so that what follows it is aligned."""
    return -(-plan.workspace_size // 16) * 16


def _place(plan: Plan, layout: Layout, buffer: Tensor) -> None:
    """The layout of sequences in PyTorch operations."""
    pitch, buffer = _pitch(plan), buffer[_workspace(plan) // 4 :]
    queries, keys = _lengths(layout)
    lengths = buffer[: 2 * pitch].view(2, pitch).zero_()
    lengths[0, : queries.shape[0]] = queries
    lengths[1, : keys.shape[0]] = keys
    offsets = buffer[2 * pitch :].view(torch.int64 if plan.key.wide else torch.int32).view(-1, pitch)
    for row, name, stride in zip(offsets, plan.names, plan.token_strides, strict=True):
        ends = (layout.cu_seq_q if name in OF_QUERIES else layout.cu_seq_k).to(row.dtype) * stride
        row.copy_(torch.cat((ends, ends[-1:].expand(pitch - ends.shape[0]))))


def _lengths(layout: Layout) -> tuple[Tensor, Tensor]:
    """The numbers of queries and of used keys of each sequence, both 0 where one is."""
    queries, keys = layout.cu_seq_q.diff(), layout.cu_seq_k.diff()
    if layout.seqused_k is not None:
        keys = torch.minimum(keys, layout.seqused_k)
    alive = (queries > 0) & (keys > 0)
    return queries * alive, keys * alive


def _row_and_sequence(ends: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """For each of ``rows`` rows its index and its sequence; behind the last sequence the number of sequences."""
    row = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    return row, torch.searchsorted(ends[1:].contiguous(), row, right=True)


def _queries_without_keys(layout: Layout, rows: int, right: int) -> Tensor:
    row, sequence = _row_and_sequence(layout.cu_seq_q, rows)
    behind = sequence == layout.cu_seq_q.shape[0] - 1
    sequence = sequence.clamp(max=layout.cu_seq_q.shape[0] - 2)
    queries, keys = (x[sequence] for x in _lengths(layout))
    at = row - layout.cu_seq_q[sequence]
    return behind | (keys == 0) | (at + keys - queries + right < 0)


def _keys_without_queries(layout: Layout, rows: int) -> Tensor:
    row, sequence = _row_and_sequence(layout.cu_seq_k, rows)
    behind = sequence == layout.cu_seq_k.shape[0] - 1
    sequence = sequence.clamp(max=layout.cu_seq_k.shape[0] - 2)
    return behind | (row - layout.cu_seq_k[sequence] >= _lengths(layout)[1][sequence])


def _place_key(plan: Plan, layout: Layout) -> tuple[object, ...]:
    return (plan.number, *_alignments(layout), kind(layout.cu_seq_q.shape[0] - 1), layout.seqused_k is not None)


def _place_args(plan: Plan, layout: Layout, places: Places) -> tuple[object, ...]:
    key = plan.key
    strides = plan.token_strides + (0,) * (9 - len(plan.names))
    numbers = (layout.cu_seq_q.shape[0] - 1, key.sequences, _pitch(plan), _workspace(plan) // 4)
    return (places.buffer, *_ends(layout), *numbers, *strides, key.wide, layout.seqused_k is not None, SEQUENCES)


if triton is not None:

    @triton.jit
    def _sequence(ends_q, ends_k, used, i, sequences, HAS_USED: tl.constexpr):
        """Of sequence ``i``, or of an empty one behind the last: its first query, its first key, and how many it has."""
        this, after = tl.minimum(i, sequences), tl.minimum(i + 1, sequences)
        first_q, first_k = tl.load(ends_q + this), tl.load(ends_k + this)
        queries, rows = tl.load(ends_q + after) - first_q, tl.load(ends_k + after) - first_k
        keys = rows
        if HAS_USED:
            keys = tl.minimum(rows, tl.load(used + this, mask=this < sequences, other=0))
        return first_q, first_k, queries, keys, rows

    @triton.jit
    def _offsets(buffer, row, at, mask, first, pitch, stride, WIDE: tl.constexpr):
        offsets = buffer + 2 * pitch
        if WIDE:
            offsets = offsets.to(tl.pointer_type(tl.int64))
        tl.store(offsets + row * pitch + at, (first.to(tl.int64) * stride).to(offsets.dtype.element_ty), mask=mask)

    @triton.jit
    def _write_places(
        program,
        buffer,
        ends_q,
        ends_k,
        used,
        sequences,
        padded,
        pitch,
        start,
        stride_q,
        stride_k,
        stride_v,
        stride_o,
        stride_stats,
        stride_g,
        stride_dq,
        stride_dk,
        stride_dv,
        WIDE: tl.constexpr,
        HAS_USED: tl.constexpr,
        BACKWARD: tl.constexpr,
        SEQUENCES: tl.constexpr,
    ):
        buffer += start
        at = program * SEQUENCES + tl.arange(0, SEQUENCES)
        mask = at <= padded
        first_q, first_k, queries, keys, _ = _sequence(ends_q, ends_k, used, at, sequences, HAS_USED)
        alive = (queries > 0) & (keys > 0)
        tl.store(buffer + at, tl.where(alive, queries, 0), mask=mask)
        tl.store(buffer + pitch + at, tl.where(alive, keys, 0), mask=mask)
        _offsets(buffer, 0, at, mask, first_q, pitch, stride_q, WIDE)
        _offsets(buffer, 1, at, mask, first_k, pitch, stride_k, WIDE)
        _offsets(buffer, 2, at, mask, first_k, pitch, stride_v, WIDE)
        _offsets(buffer, 3, at, mask, first_q, pitch, stride_o, WIDE)
        _offsets(buffer, 4, at, mask, first_q, pitch, stride_stats, WIDE)
        if BACKWARD:
            _offsets(buffer, 5, at, mask, first_q, pitch, stride_g, WIDE)
            _offsets(buffer, 6, at, mask, first_q, pitch, stride_dq, WIDE)
            _offsets(buffer, 7, at, mask, first_k, pitch, stride_dk, WIDE)
            _offsets(buffer, 8, at, mask, first_k, pitch, stride_dv, WIDE)

    @triton.jit
    def _place_kernel(
        buffer,
        ends_q,
        ends_k,
        used,
        sequences,
        padded,
        pitch,
        start,
        stride_q,
        stride_k,
        stride_v,
        stride_o,
        stride_stats,
        stride_g,
        stride_dq,
        stride_dk,
        stride_dv,
        WIDE: tl.constexpr,
        HAS_USED: tl.constexpr,
        SEQUENCES: tl.constexpr,
    ):
        _write_places(
            tl.program_id(0),
            buffer,
            ends_q,
            ends_k,
            used,
            sequences,
            padded,
            pitch,
            start,
            stride_q,
            stride_k,
            stride_v,
            stride_o,
            stride_stats,
            stride_g,
            stride_dq,
            stride_dk,
            stride_dv,
            WIDE,
            HAS_USED,
            False,
            SEQUENCES,
        )

    @triton.jit
    def _place_backward_kernel(
        buffer,
        ends_q,
        ends_k,
        used,
        sequences,
        padded,
        pitch,
        start,
        stride_q,
        stride_k,
        stride_v,
        stride_o,
        stride_stats,
        stride_g,
        stride_dq,
        stride_dk,
        stride_dv,
        WIDE: tl.constexpr,
        HAS_USED: tl.constexpr,
        lse,
        stats,
        rows,
        HEADS: tl.constexpr,
        BLOCK_HEADS: tl.constexpr,
        ROWS: tl.constexpr,
        SEQUENCES: tl.constexpr,
    ):
        """The first programs write where the sequences lie; each of the others turns ``ROWS`` rows of lse."""
        placing = tl.cdiv(padded + 1, SEQUENCES)
        program = tl.program_id(0)
        if program < placing:
            _write_places(
                program,
                buffer,
                ends_q,
                ends_k,
                used,
                sequences,
                padded,
                pitch,
                start,
                stride_q,
                stride_k,
                stride_v,
                stride_o,
                stride_stats,
                stride_g,
                stride_dq,
                stride_dk,
                stride_dv,
                WIDE,
                HAS_USED,
                True,
                SEQUENCES,
            )
        else:
            row = (program - placing) * ROWS + tl.arange(0, ROWS)[None, :]
            head = tl.arange(0, BLOCK_HEADS)[:, None]
            mask = (row < rows) & (head < HEADS)
            value = tl.load(lse + head.to(tl.int64) * rows + row, mask=mask, other=0.0)
            value = tl.where(value == float("-inf"), float("inf"), value)
            tl.store(stats + row.to(tl.int64) * HEADS + head, value, mask=mask)

    @triton.jit
    def _zero(x, begin, end, row_size, BLOCK: tl.constexpr):
        """Rows ``begin`` to ``end`` of ``x``, shared by the programs of the second axis."""
        stop = end.to(tl.int64) * row_size
        step = tl.num_programs(1) * BLOCK
        for start in range(begin.to(tl.int64) * row_size + tl.program_id(1) * BLOCK, stop, step):
            at = start + tl.arange(0, BLOCK)
            tl.store(x + at, tl.zeros((BLOCK,), x.dtype.element_ty), mask=at < stop)

    @triton.jit
    def _finish_forward_kernel(
        out,
        stats,
        lse,
        ends_q,
        ends_k,
        used,
        sequences,
        rows,
        row_size,
        right,
        HEADS: tl.constexpr,
        BLOCK_HEADS: tl.constexpr,
        HAS_USED: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        i = tl.program_id(0)
        first, _, queries, keys, _ = _sequence(ends_q, ends_k, used, i, sequences, HAS_USED)
        queries = tl.where(i < sequences, queries, rows - first)
        blind = tl.where(keys > 0, tl.minimum(tl.maximum(queries - keys - right, 0), queries), queries)
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        for start in range(tl.program_id(1) * ROWS, queries, tl.num_programs(1) * ROWS):
            at = start + tl.arange(0, ROWS)[None, :]
            mask = (at < queries) & (head < HEADS)
            row = (first + at).to(tl.int64)
            value = tl.load(stats + row * HEADS + head, mask=mask & (at >= blind), other=float("-inf"))
            tl.store(lse + head.to(tl.int64) * rows + row, value, mask=mask)
        _zero(out, first, first + blind, row_size, BLOCK)

    @triton.jit
    def _finish_backward_kernel(
        grad_query,
        grad_key,
        grad_value,
        ends_q,
        ends_k,
        used,
        sequences,
        rows_q,
        rows_k,
        size_q,
        size_k,
        size_v,
        right,
        HAS_USED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        i = tl.program_id(0)
        first_q, first_k, queries, keys, rows = _sequence(ends_q, ends_k, used, i, sequences, HAS_USED)
        queries = tl.where(i < sequences, queries, rows_q - first_q)
        rows = tl.where(i < sequences, rows, rows_k - first_k)
        blind = tl.where(keys > 0, tl.minimum(tl.maximum(queries - keys - right, 0), queries), queries)
        seen = tl.where(queries > 0, keys, 0)
        _zero(grad_query, first_q, first_q + blind, size_q, BLOCK)
        _zero(grad_key, first_k + seen, first_k + rows, size_k, BLOCK)
        _zero(grad_value, first_k + seen, first_k + rows, size_v, BLOCK)

    _launch_place, _launch_place_backward = Launcher(_place_kernel), Launcher(_place_backward_kernel)
    _launch_finish_forward, _launch_finish_backward = Launcher(_finish_forward_kernel), Launcher(_finish_backward_kernel)
