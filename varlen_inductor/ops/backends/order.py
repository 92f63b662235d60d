"""The order in which a kernel takes sequences: the longest first, where that is for the kernel alone to know.

A kernel that starts the blocks of one sequence after those of another ends with the last one's. If that is a long one, most of
the device waits for a few blocks. A kernel that is told where each sequence begins and how long it is, each by itself, may be
told of them in any order: rows stay where they are, and so do those of its results.

The order costs no launch of its own: a kernel that runs before the attention anyway finds it (`tails`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton 3.6 evaluates annotations, so nothing but constexpr has one.)

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from varlen_inductor.ops.backends.memory import empty
from varlen_inductor.ops.problem import Layout

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch without Triton
    triton = None

MOST_SEQUENCES = 256
"""With more of them the last one is hardly ever a large part; each program looks at all lengths at once."""


_A_WARP = 32


def lengths_at_once(sequences: int) -> int:
    """How many lengths a program looks at: one of two numbers, for it is compiled for each."""
    return _A_WARP if sequences <= _A_WARP else MOST_SEQUENCES


class Order(NamedTuple):
    """Sequences by their number of keys, the longest first, for that is what a block of queries takes; else as in the batch."""

    starts_q: Tensor
    """(N + 1,) int32: the first row of each; the last entry is the end of all."""
    used_q: Tensor
    """(N,) int32: how many queries each has."""
    starts_k: Tensor
    used_k: Tensor
    """Of keys; the same tensors where queries and keys have the same offsets."""


def empty_order(layout: Layout, like: Tensor) -> Order | None:
    """Memory for the order of the sequences of ``layout``, if there may be one; `write_order` fills it.

    One sequence has an order, too: kernels may be compiled for whether lengths are given.
    """
    cu_q, cu_k = layout.cu_seq_q, layout.cu_seq_k
    sequences = cu_q.shape[0] - 1
    if not 0 < sequences <= MOST_SEQUENCES or not (cu_q.is_contiguous() and cu_k.is_contiguous()):
        return None
    starts, used = empty(like, sequences + 1, dtype=torch.int32), empty(like, sequences, dtype=torch.int32)
    if cu_q is cu_k or cu_q.data_ptr() == cu_k.data_ptr():
        return Order(starts, used, starts, used)
    return Order(starts, used, empty(like, sequences + 1, dtype=torch.int32), empty(like, sequences, dtype=torch.int32))


if triton is not None:

    @triton.jit
    def write_order(
        cu_q,
        cu_k,
        starts_q,
        used_q,
        starts_k,
        used_k,
        sequences,
        program,
        programs,
        APART: tl.constexpr,
        MOST: tl.constexpr,
    ):
        """Fills an `Order`, shared by ``programs`` programs. ``APART``: queries and keys have offsets of their own."""
        other = tl.arange(0, MOST)
        inside = other < sequences
        lengths = tl.load(cu_k + other + 1, mask=inside, other=0) - tl.load(cu_k + other, mask=inside, other=0)
        for i in range(program, sequences, programs):
            start = tl.load(cu_k + i)
            length = tl.load(cu_k + i + 1) - start
            ahead = (lengths > length) | ((lengths == length) & (other < i))
            place = tl.sum(ahead.to(tl.int32), 0)
            tl.store(starts_k + place, start)
            tl.store(used_k + place, length)
            if APART:
                start_q = tl.load(cu_q + i)
                tl.store(starts_q + place, start_q)
                tl.store(used_q + place, tl.load(cu_q + i + 1) - start_q)
        if program == 0:
            tl.store(starts_k + sequences, tl.load(cu_k + sequences))
            if APART:
                tl.store(starts_q + sequences, tl.load(cu_q + sequences))
