"""What surrounds a cuDNN kernel, each in one launch: where its sequences lie, the layout of lse, and rows that it leaves alone.

cuDNN wants the offset of each sequence in elements, for each tensor, and its numbers of queries and keys. It writes lse with the
heads of a row side by side, (T, H), and nothing to rows outside of its sequences. A sequence without queries or without keys is
given to it as one with neither. Without Triton, PyTorch operations do the same.

Most calls write their offsets anew, though layers share them. That a tensor still holds what it held cannot be told: generated
kernels and replayed CUDA graphs write to one and leave its version alone. Only of offsets that we made ourselves is it known
(`kept`). And lse is turned, but where the graph was lowered to take it as it is (``lse_by_row``).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton 3.6 evaluates annotations, so nothing but constexpr has one.)

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from varlen_inductor.ops.backends import kept
from varlen_inductor.ops.backends.cudnn_plan import OF_QUERIES, Plan
from varlen_inductor.ops.backends.launch import Launcher, kind
from varlen_inductor.ops.backends.memory import empty
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
    """The memory of a call, with where the sequences lie, and its addresses for cuDNN."""

    buffer: Tensor
    """Owns the memory: float32 for stats, laid out as ``Plan.scratch`` says."""
    tables: int
    """Where, in numbers of 32 bits, the numbers of queries begin; in front of them is the workspace, if there is one."""
    workspace: int
    """Of nothing if there is no memory for it, as in a backward that reads lse as it is."""
    stats: int
    """Of nothing if there are none."""
    pointers: tuple[int, ...]
    """Of the offsets of each tensor in the plan's order, then of the numbers of queries and of keys."""


def place(plan: Plan, layout: Layout, like: Tensor, stats: int, stream: int) -> Places:
    """Write down where the sequences lie; for a forward there is memory for its workspace, too.

    Args:
        like: on the device of the operands.
        stats: for how many numbers of them there must be memory.
        stream: the current one, as a number.
    """
    places = _new_places(plan, like, stats, with_workspace=not plan.key.backward)
    if not _with_triton(like):
        _place(plan, layout, places)
        return places
    has_used = layout.seqused_k is not None
    key = (plan.number, has_used)
    grid = (-(-(plan.key.sequences + 1) // SEQUENCES), 1, 1)
    numbers = (layout.cu_seq_q.shape[0] - 1, *_arguments(plan, places), has_used, plan.key.backward, SEQUENCES)
    if not _launch_place.again(grid, key, stream, places.buffer.data_ptr(), *_addresses(layout), *numbers):
        _launch_place(grid, key, places.buffer.view(torch.int32), *_ends(layout), *numbers)
    return places


def place_once(plan: Plan, layout: Layout, stream: int) -> Places:
    """The same without stats, on one stream, with the same offsets for queries and keys: once for all that share them.

    Forwards share the workspace, too: no one of them begins before the one before it has ended. All of it is there as long as the
    offsets, which would be long for the workspace of a backward: float32 for each row of the padded batch (`workspace`).
    """
    offsets = layout.cu_seq_q
    memory = kept.with_tensor(offsets)
    if memory is None:
        return place(plan, layout, offsets, 0, stream)
    key = ("cudnn", plan.number, stream)
    places: Places | None = memory.get(key)
    if places is None:
        places = memory[key] = place(plan, layout, offsets, 0, stream)
    return places


def workspace(plan: Plan, like: Tensor) -> Tensor:
    """Memory for the workspace of one call, on the device of ``like``."""
    return empty(like, plan.scratch.lengths, dtype=torch.uint8)


def place_backward(plan: Plan, layout: Layout, lse: Tensor, stream: int) -> Places:
    """The same for a backward; also stats (T, H): lse (H, T), but +inf for a query that sees no key.

    Every weight is computed as exp(score - lse), so with +inf there is none, whatever became of the scores.
    """
    heads, tokens = lse.shape
    places = _new_places(plan, lse, lse.numel(), with_workspace=True)
    if not _with_triton(lse):
        _place(plan, layout, places)
        stats_of(plan, places, tokens).copy_(lse.masked_fill(lse == -math.inf, math.inf).t())
        return places
    has_used, address = layout.seqused_k is not None, lse.data_ptr()
    key = (plan.number, has_used, kind(tokens), address % 16)
    grid = (-(-(plan.key.sequences + 1) // SEQUENCES) - (-tokens // ROWS), 1, 1)
    numbers = (layout.cu_seq_q.shape[0] - 1, *_arguments(plan, places), has_used)
    sizes = (tokens, heads, _power_of_two(heads), ROWS, SEQUENCES)
    args = (places.buffer.data_ptr(), *_addresses(layout), *numbers, address, places.stats, *sizes)
    if not _launch_place_backward.again(grid, key, stream, *args):
        stats = stats_of(plan, places, tokens)
        _launch_place_backward(grid, key, places.buffer.view(torch.int32), *_ends(layout), *numbers, lse, stats, *sizes)
    return places


def stats_of(plan: Plan, places: Places, tokens: int) -> Tensor:
    """Stats (T, H), float32: lse with the heads of a row side by side."""
    return places.buffer[places.tables + (plan.scratch.stats - plan.scratch.lengths) // 4 :].view(tokens, plan.key.heads)


def finish_forward(plan: Plan, layout: Layout, places: Places, out: Tensor, lse: Tensor, stream: int) -> None:
    """Writes lse (H, T) from stats, -inf for queries that see no key, whose rows in ``out`` (T, H, D_v) become zeros.

    Rows behind the last sequence are such too, but are left alone where they are not read.
    """
    tokens, heads, dim_v = out.shape
    right = plan.key.rule.window_right
    right = _FAR if right == UNBOUNDED else right
    if not _with_triton(out):
        dead = _queries_without_keys(layout, tokens, right)
        out.masked_fill_(dead[:, None, None], 0.0)
        lse.copy_(torch.where(dead[:, None], -math.inf, stats_of(plan, places, tokens)).t())
        return
    sequences, has_used = layout.cu_seq_q.shape[0] - 1, layout.seqused_k is not None
    key = (plan.number, has_used, kind(tokens))
    grid = (sequences + (not layout.tails_unread), -(-max(layout.max_q, 1) // ROWS), 1)
    numbers = (sequences, tokens, right, heads * dim_v, heads, _power_of_two(heads), has_used, ROWS, BLOCK)
    args = (out.data_ptr(), places.stats, lse.data_ptr(), *_addresses(layout), *numbers)
    if not _launch_finish_forward.again(grid, key, stream, *args):
        _launch_finish_forward(grid, key, out, stats_of(plan, places, tokens), lse, *_ends(layout), *numbers)


def finish_backward(plan: Plan, layout: Layout, grads: tuple[Tensor, Tensor, Tensor]) -> None:
    """Zeroes what has no gradient: queries that see no key, keys that are not used or have no query, rows behind the end.

    Heads are contiguous in the gradients, rows need not be.
    """
    grad_query, grad_key, grad_value = grads
    right = plan.key.rule.window_right
    right = _FAR if right == UNBOUNDED else right
    if not _with_triton(grad_query):
        grad_query.masked_fill_(_queries_without_keys(layout, grad_query.shape[0], right)[:, None, None], 0.0)
        dead = _keys_without_queries(layout, grad_key.shape[0])[:, None, None]
        grad_key.masked_fill_(dead, 0.0)
        grad_value.masked_fill_(dead, 0.0)
        return
    sequences, has_used = layout.cu_seq_q.shape[0] - 1, layout.seqused_k is not None
    rows = (grad_query.shape[0], grad_key.shape[0])
    steps = (grad_query.stride(0), grad_key.stride(0), grad_value.stride(0))
    sizes = [x.shape[1] * x.shape[2] for x in grads]
    alignments = [x.data_ptr() % 16 for x in grads]
    key = (plan.number, has_used, *map(kind, rows), *alignments)
    grid = (sequences + (not layout.tails_unread), PROGRAMS, 1)
    _launch_finish_backward(grid, key, *grads, *_ends(layout), sequences, *rows, *steps, right, *sizes, has_used, BLOCK)


def _with_triton(x: Tensor) -> bool:
    return triton is not None and x.is_cuda


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _ends(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """``cu_seq_q``, ``cu_seq_k`` and ``seqused_k``, or something in its place that is not read."""
    used = layout.cu_seq_k if layout.seqused_k is None else layout.seqused_k
    return layout.cu_seq_q, layout.cu_seq_k, used


def _addresses(layout: Layout) -> tuple[int, int, int]:
    """Of ``_ends``. No kernel is compiled for an alignment of them."""
    ends_q, ends_k, used = layout.cu_seq_q, layout.cu_seq_k, layout.seqused_k
    at_k = ends_k.data_ptr()
    return ends_q.data_ptr(), at_k, at_k if used is None else used.data_ptr()


# --- places ----------------------------------------------------------------------------------------------------------


def _new_places(plan: Plan, like: Tensor, stats: int, with_workspace: bool) -> Places:
    """Uninitialized."""
    scratch = plan.scratch
    left_out = 0 if with_workspace else scratch.lengths
    buffer = empty(like, (scratch.stats - left_out) // 4 + stats, dtype=torch.float32)
    start = buffer.data_ptr() - left_out
    tables = (scratch.lengths - left_out) // 4
    return Places(buffer, tables, start, start + scratch.stats, tuple(map(start.__add__, scratch.pointers)))


def _arguments(plan: Plan, places: Places) -> tuple[int | bool, ...]:
    """Of the kernel that writes them, behind the number of sequences."""
    return *plan.scratch.arguments[:2], places.tables, *plan.scratch.arguments[2:]


def _place(plan: Plan, layout: Layout, places: Places) -> None:
    """The layout of sequences in PyTorch operations."""
    buffer = places.buffer.view(torch.int32)
    pitch, start = plan.scratch.pitch, places.tables
    stop = start + (plan.scratch.stats - plan.scratch.lengths) // 4
    queries, keys = _lengths(layout)
    lengths = buffer[start : start + 2 * pitch].view(2, pitch).zero_()
    lengths[0, : queries.shape[0]] = queries
    lengths[1, : keys.shape[0]] = keys
    offsets = buffer[start + 2 * pitch : stop].view(torch.int64 if plan.key.wide else torch.int32).view(-1, pitch)
    for row, name, stride in zip(offsets[: len(plan.names)], plan.names, plan.token_strides, strict=True):
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


if triton is not None:
    # No kernel is compiled anew for another number of sequences or another alignment of these: then what a compiled kernel depends
    # on is nearly all in the plan, and the one that fits is found by the plan's number.
    _any_layout = triton.jit(
        do_not_specialize=["sequences"],
        do_not_specialize_on_alignment=["ends_q", "ends_k", "used"],
    )

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

    @_any_layout
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
        BACKWARD: tl.constexpr,
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
            BACKWARD,
            SEQUENCES,
        )

    @_any_layout
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
    def _zero(x, begin, end, step, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        """Rows ``begin`` to ``end`` of ``x``, ``step`` apart and of ``SIZE`` numbers, shared by the programs of the second axis."""
        stop = end.to(tl.int64) * SIZE
        stride = tl.num_programs(1) * BLOCK
        for start in range(begin.to(tl.int64) * SIZE + tl.program_id(1) * BLOCK, stop, stride):
            at = start + tl.arange(0, BLOCK)
            place = at // SIZE * step + at % SIZE
            tl.store(x + place, tl.zeros((BLOCK,), x.dtype.element_ty), mask=at < stop)

    @_any_layout
    def _finish_forward_kernel(
        out,
        stats,
        lse,
        ends_q,
        ends_k,
        used,
        sequences,
        rows,
        right,
        SIZE: tl.constexpr,
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
        _zero(out, first, first + blind, SIZE, SIZE, BLOCK)

    @_any_layout
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
        step_q,
        step_k,
        step_v,
        right,
        SIZE_Q: tl.constexpr,
        SIZE_K: tl.constexpr,
        SIZE_V: tl.constexpr,
        HAS_USED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        i = tl.program_id(0)
        first_q, first_k, queries, keys, rows = _sequence(ends_q, ends_k, used, i, sequences, HAS_USED)
        queries = tl.where(i < sequences, queries, rows_q - first_q)
        rows = tl.where(i < sequences, rows, rows_k - first_k)
        blind = tl.where(keys > 0, tl.minimum(tl.maximum(queries - keys - right, 0), queries), queries)
        seen = tl.where(queries > 0, keys, 0)
        _zero(grad_query, first_q, first_q + blind, step_q, SIZE_Q, BLOCK)
        _zero(grad_key, first_k + seen, first_k + rows, step_k, SIZE_K, BLOCK)
        _zero(grad_value, first_k + seen, first_k + rows, step_v, SIZE_V, BLOCK)

    _launch_place, _launch_place_backward = Launcher(_place_kernel), Launcher(_place_backward_kernel)
    _launch_finish_forward, _launch_finish_backward = Launcher(_finish_forward_kernel), Launcher(_finish_backward_kernel)
