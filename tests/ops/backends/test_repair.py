"""What repairs a forward that reads behind sequences, in Triton's interpreter: against the reference, and what it leaves alone."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from attention_cases import WINDOWS, assert_close, make_case, reference
from triton_interpreter import interpret, needs_interpreter
from varlen_inductor.ops.attention import split_arguments
from varlen_inductor.ops.backends import triton_kernel

pytestmark = needs_interpreter
MARK = 77.0
HEADS, GROUPS = 4, 2


def small_blocks() -> None:
    blocks = triton_kernel.Blocks(16, 16, 4, 1)
    triton_kernel.OTHER.update(dict.fromkeys(triton_kernel.OTHER, triton_kernel.Tiles(blocks, blocks, blocks)))
    triton_kernel.REACH, triton_kernel.REPAIRERS = 32, 2
    torch.manual_seed(0)


def check(lengths: tuple[int, ...], tail: int, window: str = "full", bad: float | None = None, at: int = 0, used: int = -1) -> None:
    """``bad`` stands in row ``at`` behind the last sequence, in the last head of value. ``used``: other lengths for keys."""
    lengths_k = lengths if used < 0 else tuple(max(n - used, 0) for n in lengths)
    sizes = {"heads": (HEADS, HEADS // GROUPS), "dims": (16, 16), "dtype": torch.float16}
    case = make_case(lengths, lengths_k, window=WINDOWS[window], tail=tail, fill=1.0, **sizes)
    layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
    expected, expected_lse = reference(case)
    query, key, value = (x.detach() for x in case.operands[:3])
    (end_q, end_k), ends_k = case.tokens(), case.cu_seq_k.tolist()
    if bad is not None:
        value[end_k + at, -1, 3] = bad
    out, lse = torch.full_like(query, MARK), torch.full((HEADS, query.shape[0]), MARK)
    triton_kernel.repair_forward(out, lse, query, key, value, layout, rule)
    assert (out[end_q:] == 0).all()
    assert (lse[:, end_q:] == -math.inf).all()
    spoiled = bad is not None and not math.isfinite(bad) and at < triton_kernel.REACH
    starts = case.cu_seq_q.tolist()
    for i, (start, stop) in enumerate(pairwise(starts)):
        for head in range(HEADS):
            if spoiled and head >= HEADS - GROUPS and end_k - ends_k[i + 1] < triton_kernel.REACH:
                assert_close(out[start:stop, head], expected[start:stop, head], torch.float16, f"out of {i}, {head}")
                assert_close(lse[head, start:stop], expected_lse[head, start:stop], torch.float16, f"lse of {i}, {head}")
            else:
                assert (out[start:stop, head] == MARK).all(), (i, head)
                assert (lse[head, start:stop] == MARK).all(), (i, head)


def check_all() -> None:
    small_blocks()
    for bad in (math.nan, math.inf, -math.inf):
        check((5, 40, 37), 9, bad=bad, at=8)
    for lengths in ((70,), (1,), (33, 20, 5, 1), (50, 0, 32), (50, 31, 0), (0, 0), (3,) * 12):
        check(lengths, 7, bad=math.nan)
        check(lengths, 7)
        check(lengths, 0)
    check((40, 20), 40, bad=math.nan, at=31)
    check((40, 20), 40, bad=math.nan, at=32)
    check((40, 20), 40, bad=65504.0)
    for window in WINDOWS:
        check((20, 40, 37), 5, window, bad=math.nan)
    check((20, 9, 37), 5, "causal", bad=math.nan, used=10)


def test_in_the_interpreter() -> None:
    interpret("ops/backends/test_repair", "check_all")
