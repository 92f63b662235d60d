"""What the Triton kernels of both directions share: where a sequence lies, which keys are in reach, what is dropped.

Offsets of tensors are computed in 64 bits: a row or a dim times its stride may pass 2**31 long before the rows themselves do.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton 3.6 evaluates annotations, so nothing but constexpr has one.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence(cu_q, cu_k, used_k, index):
    """First query row, number of queries, first key row, number of keys in use, number of key rows."""
    q_start, q_stop = tl.load(cu_q + index), tl.load(cu_q + index + 1)
    k_start, k_stop = tl.load(cu_k + index), tl.load(cu_k + index + 1)
    k_rows = k_stop - k_start
    k_len = k_rows
    if used_k is not None:
        k_len = tl.minimum(tl.load(used_k + index), k_rows)
    return q_start.to(tl.int64), q_stop - q_start, k_start.to(tl.int64), k_len, k_rows


@triton.jit
def paged_sequence(cu_q, used_k, index):
    """First query row, number of queries, number of keys in use, where keys are in pages."""
    q_start, q_stop = tl.load(cu_q + index), tl.load(cu_q + index + 1)
    return q_start.to(tl.int64), q_stop - q_start, tl.load(used_k + index)


@triton.jit
def reach(
    first,
    shift,
    length,
    before,
    after,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
):
    """The blocks of the other side that rows ``first`` to ``first + COUNT`` can see, as four bounds lo, a, b, hi.

    Row ``i`` sees ``i + shift - before`` to ``i + shift + after`` (each only if BEFORE, AFTER), out of ``length``. Blocks in
    [lo, a) and [b, hi) are seen in part, those in [a, b) as a whole, by every row.
    """
    lo = 0
    a = 0
    hi = length
    b = length
    if BEFORE:
        lo = tl.minimum(tl.maximum(first + shift - before, 0), length) // BLOCK * BLOCK
        a = (tl.maximum(first + COUNT - 1 + shift - before, 0) + BLOCK - 1) // BLOCK * BLOCK
    if AFTER:
        hi = tl.minimum(tl.maximum(first + COUNT + shift + after, 0), length)
        b = tl.minimum(tl.maximum(first + 1 + shift + after, 0), length)
    a = tl.minimum(a, hi)
    return lo, a, tl.maximum(b // BLOCK * BLOCK, a), hi


@triton.jit
def in_window(distance, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether a key that lies ``distance`` behind the query's own place is seen."""
    seen = distance == distance
    if LEFT:
        seen &= distance >= -left
    if RIGHT:
        seen &= distance <= right
    return seen


@triton.jit
def load_rows(
    x,
    rows,
    stride,
    stride_dim,
    length,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECK: tl.constexpr,
):
    """The tile (rows, BLOCK) of ``x``, a pointer or one for each row (rows, 1).

    Zero in dims from DIM on and, with CHECK, in rows that are not below ``length``.
    """
    dims = tl.arange(0, BLOCK)
    at = x + rows[:, None].to(tl.int64) * stride + dims[None, :].to(tl.int64) * stride_dim
    if CHECK:
        inside = rows[:, None] < length
        if DIM != BLOCK:
            inside &= dims[None, :] < DIM
        tile = tl.load(at, mask=inside, other=0.0)
    elif DIM != BLOCK:
        tile = tl.load(at, mask=dims[None, :] < DIM, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def page_of(table, cols, start, length, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """In which page the keys ``cols`` (BLOCK from ``start``) lie, and which key of the sequence is the first in it.

    Two numbers where a page holds whole blocks, else (BLOCK, 1). ``start`` is a multiple of BLOCK below ``length``.
    """
    if PAGE % BLOCK == 0:
        place = start // PAGE
        page = tl.load(table + place)
    else:
        place = (cols // PAGE)[:, None]
        page = tl.load(table + place, mask=cols[:, None] < length, other=0)
    return page.to(tl.int64), (place * PAGE).to(tl.int64)


@triton.jit
def tanh(x):
    """By one exponential and one division; exact to about 1e-7 of 1, and at both ends."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.885390081777927))


@triton.jit
def store_rows(x, tile, rows, stride, length, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the rows of ``tile`` (rows, BLOCK) that are below ``length``. The last dim of ``x`` is contiguous."""
    dims = tl.arange(0, BLOCK)
    inside = rows[:, None] < length
    if DIM != BLOCK:
        inside &= dims[None, :] < DIM
    tl.store(x + rows[:, None].to(tl.int64) * stride + dims[None, :], tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def zero_rows(x, stride, first, length, DIM: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Zeroes rows ``first`` to ``length`` of one head, COUNT at a time, shared out along the first axis of the grid."""
    for start in range(first + tl.program_id(0) * COUNT, length, tl.num_programs(0) * COUNT):
        store_rows(x, tl.zeros((COUNT, BLOCK), tl.float32), start + tl.arange(0, COUNT), stride, length, DIM, BLOCK)


@triton.jit
def kept(rng_state, head, queries, first_key, threshold, COUNT: tl.constexpr):
    """Which weights (queries, COUNT keys from ``first_key``, a multiple of 4) are kept: a function of their places alone.

    One Philox call decides for four keys. ``queries`` are rows of the whole tensor, so that sequences differ.
    """
    seed, offset = tl.load(rng_state), tl.load(rng_state + 1).to(tl.uint32)
    four = (first_key // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)[None, :] + tl.zeros_like(queries).to(tl.uint32)[:, None]
    rows = queries.to(tl.uint32)[:, None] + tl.zeros_like(four)
    r0, r1, r2, r3 = tl.philox(seed, four, rows, tl.zeros_like(four) + head.to(tl.uint32), tl.zeros_like(four) + offset)
    bits = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    return tl.reshape(bits, (queries.shape[0], COUNT)) < threshold
