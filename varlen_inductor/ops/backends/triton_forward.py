"""The forward of the Triton kernel: one program for a block of queries of one head, with an online softmax over its keys."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton 3.6 evaluates annotations, so nothing but constexpr has one.)

from __future__ import annotations

import triton
import triton.language as tl

from varlen_inductor.ops.backends.launch import gdc_wait
from varlen_inductor.ops.backends.triton_common import (
    in_window,
    kept,
    load_rows,
    page_of,
    paged_sequence,
    reach,
    sequence,
    store_rows,
    tanh,
    zero_rows,
)


@triton.jit
def _step(
    acc,
    top,
    total,
    q,
    key,
    value,
    at_q,
    position_k,
    rng_state,
    table,
    start,
    k_len,
    head,
    rng_rows,
    stride_kp,
    stride_k,
    stride_kd,
    stride_vp,
    stride_v,
    stride_vd,
    scale,
    inner,
    threshold,
    left,
    right,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Takes the keys from ``start`` into (acc, top, total): sum of values, largest score, sum of exponentials."""
    cols = start + tl.arange(0, BLOCK_N)
    if table is not None:
        page, page_start = page_of(table, cols, start, k_len, PAGE, BLOCK_N)
        key += page * stride_kp - page_start * stride_k
        value += page * stride_vp - page_start * stride_v
    k = load_rows(key, cols, stride_k, stride_kd, k_len, DIM, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if inner is not None:
        scores = tanh(scores * inner)
    if MASKED:
        at_k = cols
        if position_k is not None:
            at_k = tl.load(position_k + cols, mask=cols < k_len, other=0)
        seen = (cols < k_len)[None, :] & in_window(at_k[None, :] - at_q[:, None], left, right, LEFT, RIGHT)
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    if rng_state is not None:
        weights = tl.where(kept(rng_state, head, rng_rows, start, threshold, BLOCK_N), weights, 0.0)
    v = load_rows(value, cols, stride_v, stride_vd, k_len, DIM_V, BLOCK_DV, MASKED)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def _attend(
    query,
    key,
    value,
    out,
    lse,
    position_q,
    position_k,
    rng_state,
    table,
    head,
    first,
    q_start,
    q_len,
    k_start,
    k_len,
    stride_q,
    stride_qh,
    stride_qd,
    stride_k,
    stride_kh,
    stride_kd,
    stride_v,
    stride_vh,
    stride_vd,
    stride_o,
    stride_kp,
    stride_vp,
    scale,
    inner,
    threshold,
    keep,
    left,
    right,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE: tl.constexpr,
):
    """The queries of one sequence from ``first`` on, BLOCK_M of them. ``out`` and ``lse`` are those of the head."""
    rows = first + tl.arange(0, BLOCK_M)
    q_base = query + q_start * stride_q + head.to(tl.int64) * stride_qh
    k_base = key + k_start * stride_k + (head // GROUPS).to(tl.int64) * stride_kh
    v_base = value + k_start * stride_v + (head // GROUPS).to(tl.int64) * stride_vh
    q = load_rows(q_base, rows, stride_q, stride_qd, q_len, DIM, BLOCK_D, True)
    if position_q is None:
        at_k = None
        at_q = rows + (k_len - q_len)
        lo, a, b, hi = reach(first, k_len - q_len, k_len, left, right, BLOCK_M, BLOCK_N, LEFT, RIGHT)
    else:
        at_k = position_k + k_start
        at_q = tl.load(position_q + q_start + rows, mask=rows < q_len, other=0)
        lo, a, b, hi = 0, 0, 0, k_len
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if LEFT:
        for start in range(lo, a, BLOCK_N):
            acc, top, total = _step(
                acc, top, total, q, k_base, v_base, at_q, at_k, rng_state, table, start, k_len, head, q_start + rows,
                stride_kp, stride_k, stride_kd, stride_vp, stride_v, stride_vd, scale, inner, threshold, left, right,
                DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, LEFT, RIGHT, PRECISION, PAGE, True,
            )  # fmt: skip
    for start in range(a, b, BLOCK_N):
        acc, top, total = _step(
            acc, top, total, q, k_base, v_base, at_q, at_k, rng_state, table, start, k_len, head, q_start + rows,
            stride_kp, stride_k, stride_kd, stride_vp, stride_v, stride_vd, scale, inner, threshold, left, right,
            DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, LEFT, RIGHT, PRECISION, PAGE, False,
        )  # fmt: skip
    for start in range(b, hi, BLOCK_N):
        acc, top, total = _step(
            acc, top, total, q, k_base, v_base, at_q, at_k, rng_state, table, start, k_len, head, q_start + rows,
            stride_kp, stride_k, stride_kd, stride_vp, stride_v, stride_vd, scale, inner, threshold, left, right,
            DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, LEFT, RIGHT, PRECISION, PAGE, True,
        )  # fmt: skip
    acc = acc / (tl.where(total > 0.0, total, 1.0) * keep)[:, None]
    store_rows(out + q_start * stride_o, acc, rows, stride_o, q_len, DIM_V, BLOCK_DV)
    if lse is not None:
        result = tl.where(total > 0.0, (top + tl.log2(tl.where(total > 0.0, total, 1.0))) * 0.6931471805599453, float("-inf"))
        tl.store(lse + q_start + rows, result, mask=rows < q_len)


@triton.jit
def _nothing_behind(out, lse, stride_o, end, rows, DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, COUNT: tl.constexpr):
    """What queries of no sequence, those from ``end`` on, give in one head; shared out along the first axis of the grid."""
    zero_rows(out, stride_o, end, rows, DIM_V, BLOCK_DV, COUNT)
    if lse is not None:
        for start in range(end + tl.program_id(0) * COUNT, rows, tl.num_programs(0) * COUNT):
            behind = start + tl.arange(0, COUNT)
            tl.store(lse + behind, float("-inf"), mask=behind < rows)


@triton.jit(do_not_specialize=["sequences", "rows_q", "left", "right"], do_not_specialize_on_alignment=["rng_state"])
def forward_kernel(
    query,
    key,
    value,
    out,
    lse,
    cu_q,
    cu_k,
    used_k,
    position_q,
    position_k,
    rng_state,
    block_table,
    stride_q,
    stride_qh,
    stride_qd,
    stride_k,
    stride_kh,
    stride_kd,
    stride_v,
    stride_vh,
    stride_vd,
    stride_o,
    stride_oh,
    stride_t,
    stride_kp,
    stride_vp,
    sequences,
    rows_q,
    scale,
    inner,
    threshold,
    keep,
    left,
    right,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Grid: (blocks of the longest sequence, heads, sequences + 1). The last "sequence" is what lies behind all of them.

    ``scale`` includes log2(e) and is not negative. With ``inner`` scores are scale * tanh(inner * x). With ``block_table``, whose
    rows are ``stride_t`` apart, keys and values are in pages of PAGE rows, ``stride_kp`` and ``stride_vp`` apart, and ``cu_k`` is
    not read. ``lse`` is (H, T_q), or None; ``out`` has its last dim contiguous.
    """
    head, index = tl.program_id(1), tl.program_id(2)
    out += head.to(tl.int64) * stride_oh
    if lse is not None:
        lse += head.to(tl.int64) * rows_q
    if index == sequences:
        _nothing_behind(out, lse, stride_o, tl.load(cu_q + sequences), rows_q, DIM_V, BLOCK_DV, BLOCK_M)
    else:
        if block_table is None:
            table = None
            q_start, q_len, k_start, k_len, _ = sequence(cu_q, cu_k, used_k, index)
        else:
            table = block_table + index.to(tl.int64) * stride_t
            k_start = 0
            q_start, q_len, k_len = paged_sequence(cu_q, used_k, index)
        first = tl.program_id(0) * BLOCK_M
        if first < q_len:
            _attend(
                query, key, value, out, lse, position_q, position_k, rng_state, table, head, first, q_start, q_len, k_start, k_len,
                stride_q, stride_qh, stride_qd, stride_k, stride_kh, stride_kd, stride_v, stride_vh, stride_vd, stride_o,
                stride_kp, stride_vp, scale, inner, threshold, keep, left, right,
                GROUPS, DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, PRECISION, PAGE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["sequences", "rows_q", "rows_k", "left", "right"])
def repair_kernel(
    query,
    key,
    value,
    out,
    lse,
    cu_q,
    cu_k,
    stride_q,
    stride_qh,
    stride_qd,
    stride_k,
    stride_kh,
    stride_kd,
    stride_v,
    stride_vh,
    stride_vd,
    stride_o,
    stride_oh,
    sequences,
    rows_q,
    rows_k,
    scale,
    inner,
    left,
    right,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    REACH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (any number, heads, 1). What a forward has left that reads up to REACH keys and values behind those of a sequence.

    Behind the last sequence ``out`` becomes zero and ``lse`` -inf. If ``value`` has NaN or infinity there, in reach, sequences that
    reach them are computed anew. With EARLY the kernel starts while the one in front still ends. What `forward_kernel` has, too, is
    as there.
    """
    head = tl.program_id(1)
    end_q, end_k = tl.load(cu_q + sequences), tl.load(cu_k + sequences)
    if EARLY:
        gdc_wait()
    if (end_q < rows_q) | (end_k < rows_k):  # one jump over all of it, usually
        out += head.to(tl.int64) * stride_oh
        lse += head.to(tl.int64) * rows_q
        _nothing_behind(out, lse, stride_o, end_q, rows_q, DIM_V, BLOCK_DV, BLOCK_M)
        spoiled = 0
        v_base = value + (head // GROUPS).to(tl.int64) * stride_vh
        for start in range(end_k, tl.minimum(rows_k, end_k + REACH), BLOCK_N):
            tile = load_rows(v_base, start + tl.arange(0, BLOCK_N), stride_v, stride_vd, rows_k, DIM_V, BLOCK_DV, True)
            finite = tl.abs(tile.to(tl.float32)) < float("inf")  # false for NaN, too
            spoiled += tl.sum((finite == 0).to(tl.int32))
        if spoiled > 0:
            index = sequences - 1
            stop = end_k
            while (index >= 0) & (end_k - stop < REACH):
                q_start, q_len, k_start, k_len, _ = sequence(cu_q, cu_k, None, index)
                for first in range(tl.program_id(0) * BLOCK_M, q_len, tl.num_programs(0) * BLOCK_M):
                    _attend(
                        query, key, value, out, lse, None, None, None, None, head, first, q_start, q_len, k_start, k_len,
                        stride_q, stride_qh, stride_qd, stride_k, stride_kh, stride_kd, stride_v, stride_vh, stride_vd, stride_o,
                        0, 0, scale, inner, 0, 1.0, left, right,
                        GROUPS, DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, PRECISION, 0,
                    )  # fmt: skip
                stop = tl.load(cu_k + index)
                index -= 1
