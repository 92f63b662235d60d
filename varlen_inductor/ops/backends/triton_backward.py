"""The backward of the Triton kernel, without atomics and so the same every time.

Three kernels: what each query's gradients have in common; gradients of queries, a block of them going through its keys;
gradients of keys and values, a block of them going through its queries. The last two compute the weights again from lse.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton 3.6 evaluates annotations, so nothing but constexpr has one.)

from __future__ import annotations

import triton
import triton.language as tl

from varlen_inductor.ops.backends.triton_common import in_window, kept, load_rows, reach, sequence, store_rows, tanh, zero_rows


@triton.jit(do_not_specialize=["sequences", "rows_q"])
def delta_kernel(
    out,
    grad_out,
    grad_lse,
    delta,
    cu_q,
    stride_o,
    stride_oh,
    stride_od,
    stride_g,
    stride_gh,
    stride_gd,
    sequences,
    rows_q,
    DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta (H, T_q) = sum over dims of out * grad_out, minus grad_lse. Grid: (blocks of T_q, heads).

    A score's gradient is its weight times (gradient of the weight - delta), to which lse adds its weight times grad_lse.
    """
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.load(cu_q + sequences)
    o = load_rows(out + head * stride_oh, rows, stride_o, stride_od, end, DIM_V, BLOCK_DV, True).to(tl.float32)
    g = load_rows(grad_out + head * stride_gh, rows, stride_g, stride_gd, end, DIM_V, BLOCK_DV, True).to(tl.float32)
    result = tl.sum(o * g, 1)
    if grad_lse is not None:
        result -= tl.load(grad_lse + head * rows_q + rows, mask=rows < end, other=0.0)
    tl.store(delta + head * rows_q + rows, result, mask=rows < end)


@triton.jit
def _score_gradients(
    q,
    k,
    v,
    g,
    row_lse,
    row_delta,
    at_q,
    at_k,
    cols,
    k_len,
    rng_state,
    head,
    rng_rows,
    first_key,
    scale,
    inner,
    threshold,
    keep,
    left,
    right,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(queries, keys): the weights after dropout, without its factor, and the gradients of the scores."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if inner is not None:
        scores = tanh(scores * inner)
    weights = tl.exp2(scores * scale - row_lse[:, None])
    if MASKED:
        seen = (cols < k_len)[None, :] & in_window(at_k[None, :] - at_q[:, None], left, right, LEFT, RIGHT)
        weights = tl.where(seen, weights, 0.0)
    grad_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    used = weights
    if rng_state is not None:
        keeps = kept(rng_state, head, rng_rows, first_key, threshold, BLOCK_N)
        used = tl.where(keeps, weights, 0.0)
        grad_weights = tl.where(keeps, grad_weights / keep, 0.0)
    grad_scores = weights * (grad_weights - row_delta[:, None])
    if inner is not None:
        grad_scores *= 1.0 - scores * scores
    return used, grad_scores


@triton.jit
def _load_rows_of_queries(lse, delta, rows, length):
    """lse, in powers of 2 and +inf (no weights) where a query sees no key or is none, and delta."""
    inside = rows < length
    row_lse = tl.load(lse + rows, mask=inside, other=float("inf")) * 1.4426950408889634
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    return row_lse, tl.load(delta + rows, mask=inside, other=0.0)


@triton.jit
def _query_step(
    acc,
    q,
    g,
    row_lse,
    row_delta,
    key,
    value,
    at_q,
    position_k,
    rng_state,
    start,
    k_len,
    head,
    rng_rows,
    stride_k,
    stride_kd,
    stride_v,
    stride_vd,
    scale,
    inner,
    threshold,
    keep,
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
    MASKED: tl.constexpr,
):
    """Adds to the gradient of the queries what comes from the keys from ``start``."""
    cols = start + tl.arange(0, BLOCK_N)
    at_k = cols
    if position_k is not None:
        at_k = tl.load(position_k + cols, mask=cols < k_len, other=0)
    k = load_rows(key, cols, stride_k, stride_kd, k_len, DIM, BLOCK_D, MASKED)
    v = load_rows(value, cols, stride_v, stride_vd, k_len, DIM_V, BLOCK_DV, MASKED)
    _, grad_scores = _score_gradients(
        q, k, v, g, row_lse, row_delta, at_q, at_k, cols, k_len, rng_state, head, rng_rows, start,
        scale, inner, threshold, keep, left, right, BLOCK_N, LEFT, RIGHT, PRECISION, MASKED,
    )  # fmt: skip
    return tl.dot(grad_scores.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["sequences", "rows_q", "left", "right"], do_not_specialize_on_alignment=["rng_state"])
def query_kernel(
    query,
    key,
    value,
    grad_out,
    lse,
    delta,
    grad_query,
    cu_q,
    cu_k,
    used_k,
    position_q,
    position_k,
    rng_state,
    stride_q,
    stride_qh,
    stride_qd,
    stride_k,
    stride_kh,
    stride_kd,
    stride_v,
    stride_vh,
    stride_vd,
    stride_g,
    stride_gh,
    stride_gd,
    stride_dq,
    stride_dqh,
    sequences,
    rows_q,
    scale,
    inner,
    scale_out,
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
):
    """Gradients of the queries. Grid and arguments as for the forward; ``scale_out`` is the scale without log2(e)."""
    head, index = tl.program_id(1), tl.program_id(2)
    grad_query += head.to(tl.int64) * stride_dqh
    if index == sequences:
        zero_rows(grad_query, stride_dq, tl.load(cu_q + sequences), rows_q, DIM, BLOCK_D, BLOCK_M)
    else:
        q_start, q_len, k_start, k_len, _ = sequence(cu_q, cu_k, used_k, index)
        first = tl.program_id(0) * BLOCK_M
        if first < q_len:
            rows = first + tl.arange(0, BLOCK_M)
            q_base = query + q_start * stride_q + head.to(tl.int64) * stride_qh
            g_base = grad_out + q_start * stride_g + head.to(tl.int64) * stride_gh
            k_base = key + k_start * stride_k + (head // GROUPS).to(tl.int64) * stride_kh
            v_base = value + k_start * stride_v + (head // GROUPS).to(tl.int64) * stride_vh
            q = load_rows(q_base, rows, stride_q, stride_qd, q_len, DIM, BLOCK_D, True)
            g = load_rows(g_base, rows, stride_g, stride_gd, q_len, DIM_V, BLOCK_DV, True)
            of_head = head.to(tl.int64) * rows_q + q_start
            row_lse, row_delta = _load_rows_of_queries(lse + of_head, delta + of_head, rows, q_len)
            if position_q is None:
                at_k = None
                at_q = rows + (k_len - q_len)
                lo, a, b, hi = reach(first, k_len - q_len, k_len, left, right, BLOCK_M, BLOCK_N, LEFT, RIGHT)
            else:
                at_k = position_k + k_start
                at_q = tl.load(position_q + q_start + rows, mask=rows < q_len, other=0)
                lo, a, b, hi = 0, 0, 0, k_len
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            if LEFT:
                for start in range(lo, a, BLOCK_N):
                    acc = _query_step(
                        acc, q, g, row_lse, row_delta, k_base, v_base, at_q, at_k, rng_state, start, k_len, head,
                        q_start + rows, stride_k, stride_kd, stride_v, stride_vd, scale, inner, threshold, keep, left, right,
                        DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, LEFT, RIGHT, PRECISION, True,
                    )  # fmt: skip
            for start in range(a, b, BLOCK_N):
                acc = _query_step(
                    acc, q, g, row_lse, row_delta, k_base, v_base, at_q, at_k, rng_state, start, k_len, head,
                    q_start + rows, stride_k, stride_kd, stride_v, stride_vd, scale, inner, threshold, keep, left, right,
                    DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, LEFT, RIGHT, PRECISION, False,
                )  # fmt: skip
            for start in range(b, hi, BLOCK_N):
                acc = _query_step(
                    acc, q, g, row_lse, row_delta, k_base, v_base, at_q, at_k, rng_state, start, k_len, head,
                    q_start + rows, stride_k, stride_kd, stride_v, stride_vd, scale, inner, threshold, keep, left, right,
                    DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, LEFT, RIGHT, PRECISION, True,
                )  # fmt: skip
            store_rows(grad_query + q_start * stride_dq, acc * scale_out, rows, stride_dq, q_len, DIM, BLOCK_D)


@triton.jit
def _key_step(
    acc_k,
    acc_v,
    k,
    v,
    query,
    grad_out,
    lse,
    delta,
    at_k,
    cols,
    k_len,
    position_q,
    rng_state,
    start,
    q_len,
    q_start,
    head,
    first_key,
    stride_q,
    stride_qd,
    stride_g,
    stride_gd,
    scale,
    inner,
    threshold,
    keep,
    left,
    right,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds to the gradients of the keys and values what comes from the queries from ``start``."""
    rows = start + tl.arange(0, BLOCK_M)
    at_q = rows + (k_len - q_len)
    if position_q is not None:
        at_q = tl.load(position_q + rows, mask=rows < q_len, other=0)
    q = load_rows(query, rows, stride_q, stride_qd, q_len, DIM, BLOCK_D, MASKED)
    g = load_rows(grad_out, rows, stride_g, stride_gd, q_len, DIM_V, BLOCK_DV, MASKED)
    row_lse, row_delta = _load_rows_of_queries(lse, delta, rows, q_len)
    weights, grad_scores = _score_gradients(
        q, k, v, g, row_lse, row_delta, at_q, at_k, cols, k_len, rng_state, head, q_start + rows, first_key,
        scale, inner, threshold, keep, left, right, BLOCK_N, LEFT, RIGHT, PRECISION, MASKED,
    )  # fmt: skip
    acc_v = tl.dot(tl.trans(weights.to(g.dtype)), g, acc_v, input_precision=PRECISION)
    acc_k = tl.dot(tl.trans(grad_scores.to(q.dtype)), q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit(do_not_specialize=["sequences", "rows_q", "rows_k", "left", "right"], do_not_specialize_on_alignment=["rng_state"])
def key_kernel(
    query,
    key,
    value,
    grad_out,
    lse,
    delta,
    grad_key,
    grad_value,
    cu_q,
    cu_k,
    used_k,
    position_q,
    position_k,
    rng_state,
    stride_q,
    stride_qh,
    stride_qd,
    stride_k,
    stride_kh,
    stride_kd,
    stride_v,
    stride_vh,
    stride_vd,
    stride_g,
    stride_gh,
    stride_gd,
    stride_dk,
    stride_dkh,
    stride_dv,
    stride_dvh,
    sequences,
    rows_q,
    rows_k,
    scale,
    inner,
    scale_out,
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
):
    """Gradients of keys and values, summed over the query heads that share them.

    Grid: (blocks of the longest key sequence, key heads, sequences + 1).
    """
    head_k, index = tl.program_id(1), tl.program_id(2)
    grad_key += head_k.to(tl.int64) * stride_dkh
    grad_value += head_k.to(tl.int64) * stride_dvh
    if index == sequences:
        end = tl.load(cu_k + sequences)
        zero_rows(grad_key, stride_dk, end, rows_k, DIM, BLOCK_D, BLOCK_N)
        zero_rows(grad_value, stride_dv, end, rows_k, DIM_V, BLOCK_DV, BLOCK_N)
    else:
        q_start, q_len, k_start, k_len, k_rows = sequence(cu_q, cu_k, used_k, index)
        grad_key += k_start * stride_dk
        grad_value += k_start * stride_dv
        if used_k is not None:
            zero_rows(grad_key, stride_dk, k_len, k_rows, DIM, BLOCK_D, BLOCK_N)
            zero_rows(grad_value, stride_dv, k_len, k_rows, DIM_V, BLOCK_DV, BLOCK_N)
        first = tl.program_id(0) * BLOCK_N
        if first < k_len:
            cols = first + tl.arange(0, BLOCK_N)
            k_base = key + k_start * stride_k + head_k.to(tl.int64) * stride_kh
            v_base = value + k_start * stride_v + head_k.to(tl.int64) * stride_vh
            k = load_rows(k_base, cols, stride_k, stride_kd, k_len, DIM, BLOCK_D, True)
            v = load_rows(v_base, cols, stride_v, stride_vd, k_len, DIM_V, BLOCK_DV, True)
            if position_q is None:
                at_k = cols
                from_q = None
                # The rule seen from a key: the sides change places, and so does the shift.
                lo, a, b, hi = reach(first, q_len - k_len, q_len, right, left, BLOCK_N, BLOCK_M, RIGHT, LEFT)
            else:
                at_k = tl.load(position_k + k_start + cols, mask=cols < k_len, other=0)
                from_q = position_q + q_start
                lo, a, b, hi = 0, 0, 0, q_len
            acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            acc_v = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
            for group in range(GROUPS):
                head = head_k * GROUPS + group
                q_base = query + q_start * stride_q + head.to(tl.int64) * stride_qh
                g_base = grad_out + q_start * stride_g + head.to(tl.int64) * stride_gh
                of_head = head.to(tl.int64) * rows_q + q_start
                if RIGHT:
                    for start in range(lo, a, BLOCK_M):
                        acc_k, acc_v = _key_step(
                            acc_k, acc_v, k, v, q_base, g_base, lse + of_head, delta + of_head, at_k, cols, k_len, from_q,
                            rng_state, start, q_len, q_start, head, first,
                            stride_q, stride_qd, stride_g, stride_gd, scale, inner, threshold, keep, left, right,
                            DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, PRECISION, True,
                        )  # fmt: skip
                for start in range(a, b, BLOCK_M):
                    acc_k, acc_v = _key_step(
                        acc_k, acc_v, k, v, q_base, g_base, lse + of_head, delta + of_head, at_k, cols, k_len, from_q,
                        rng_state, start, q_len, q_start, head, first,
                        stride_q, stride_qd, stride_g, stride_gd, scale, inner, threshold, keep, left, right,
                        DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, PRECISION, False,
                    )  # fmt: skip
                for start in range(b, hi, BLOCK_M):
                    acc_k, acc_v = _key_step(
                        acc_k, acc_v, k, v, q_base, g_base, lse + of_head, delta + of_head, at_k, cols, k_len, from_q,
                        rng_state, start, q_len, q_start, head, first,
                        stride_q, stride_qd, stride_g, stride_gd, scale, inner, threshold, keep, left, right,
                        DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, PRECISION, True,
                    )  # fmt: skip
            store_rows(grad_key, acc_k * scale_out, cols, stride_dk, k_len, DIM, BLOCK_D)
            store_rows(grad_value, acc_v / keep, cols, stride_dv, k_len, DIM_V, BLOCK_DV)
