"""varlen_attn for AOTInductor, whose code runs without Python and so cannot call our kernels: all of it in ATen operators.

On CUDA `lowering.attention` takes PyTorch's FlashAttention operator where that alone does what ours promises and ``config.kernels``
allows it. Everything else is written out here: each sequence in a row of its own, padded to the longest, and masked. That is exact
and runs anywhere, but gains nothing over a padded model, so the passes leave padded attention alone where it would come to this
(``refusal``); it is for models that call varlen attention themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from varlen_inductor.ops.backends import aten_flash, named
from varlen_inductor.ops.problem import UNBOUNDED, Layout, Problem, Rule, lse_dtype


def refusal(problem: Problem, kernels: str) -> str | None:
    """Why a rewritten attention would not be a fast kernel in AOTInductor's code, in words for the user, or None.

    Args:
        kernels: the knob ``varlen_inductor.config.kernels``.
    """
    reason = aten_flash.supports(problem)
    if reason is None and (problem.head_dim != problem.head_dim_v or problem.head_dim % 8):
        reason = "its head dims must be equal and multiples of 8"
    if reason is None and problem.windowed and problem.window_right != 0:
        reason = "its window must end at the query"
    if reason is None and problem.dropout_p > 0.0:
        reason = "it drops weights"
    if reason is not None:
        return f"AOTInductor's code can only call aten_flash: {reason}"
    wanted, forbidden = named(kernels)
    if (wanted and aten_flash.BACKEND.name not in wanted) or aten_flash.BACKEND.name in forbidden:
        return f"AOTInductor's code can only call aten_flash: config.kernels is {kernels!r}"
    return None


def attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """What ``varlen_inductor::varlen_attn`` returns.

    Raises:
        RuntimeError: weights are dropped, or keys lie in pages.
    """
    if layout.block_table is not None:
        raise RuntimeError("varlen_attn: keys in pages are not there for AOTInductor; gather them before the call")
    if rule.dropout_p > 0.0:
        raise RuntimeError("varlen_attn: dropout is not there for AOTInductor; export the model in evaluation mode")
    dtype = lse_dtype(query.dtype)
    groups = query.shape[1] // key.shape[1]
    rows_q, rows_k = _rows(layout.cu_seq_q, layout.max_q, query), _rows(layout.cu_seq_k, layout.max_k, key)
    padded_q = query[rows_q].to(dtype).permute(0, 2, 1, 3)
    padded_k, padded_v = (x[rows_k].repeat_interleave(groups, 2).to(dtype).permute(0, 2, 1, 3) for x in (key, value))
    visible = _visible(layout, rule, rows_q, rows_k)[:, None]
    # A weight of zero does not do: rows that are not the sequence's may hold NaN.
    padded_v = padded_v.masked_fill(~_in_use(layout, rows_k)[:, None, :, None], 0.0)
    scores = padded_q @ padded_k.mT * rule.scale
    if rule.softcap > 0.0:
        scores = rule.softcap * (scores / rule.softcap).tanh()
    scores = scores.masked_fill(~visible, -math.inf)
    alive = visible.any(-1)
    lse = scores.logsumexp(-1).masked_fill(~alive, -math.inf)
    weights = (scores - lse.masked_fill(~alive, 0.0)[..., None]).exp()
    return *_packed(weights @ padded_v, lse, layout, query), query.new_empty((0,), dtype=torch.uint64)


def _rows(cu_seq: Tensor, longest: int, x: Tensor) -> Tensor:
    """(N, longest): where the rows of each sequence lie in ``x``; those that it has not are any."""
    within = torch.arange(max(longest, 1), device=cu_seq.device)
    return (cu_seq[:-1, None] + within).clamp(max=x.shape[0] - 1).to(torch.int64)


def _in_use(layout: Layout, rows_k: Tensor) -> Tensor:
    """(N, max_k): which keys a sequence has, and uses."""
    used = layout.cu_seq_k.diff() if layout.seqused_k is None else layout.seqused_k
    return torch.arange(rows_k.shape[1], device=rows_k.device) < used[:, None]


def _visible(layout: Layout, rule: Rule, rows_q: Tensor, rows_k: Tensor) -> Tensor:
    """(N, max_q, max_k): which queries see which keys."""
    lengths_q, lengths_k = layout.cu_seq_q.diff(), layout.cu_seq_k.diff()
    used = lengths_k if layout.seqused_k is None else layout.seqused_k
    number_q = torch.arange(rows_q.shape[1], device=rows_q.device)
    number_k = torch.arange(rows_k.shape[1], device=rows_k.device)
    visible = (number_q < lengths_q[:, None])[:, :, None] & _in_use(layout, rows_k)[:, None, :]
    if layout.position_q is None or layout.position_k is None:
        at_q, at_k = number_q + (used - lengths_q)[:, None], number_k[None]
    else:
        at_q, at_k = layout.position_q[rows_q], layout.position_k[rows_k]
    ahead = at_k[:, None, :] - at_q[:, :, None]
    if rule.window_left != UNBOUNDED:
        visible = visible & (ahead >= -rule.window_left)
    if rule.window_right != UNBOUNDED:
        visible = visible & (ahead <= rule.window_right)
    return visible


def _packed(padded: Tensor, lse: Tensor, layout: Layout, query: Tensor) -> tuple[Tensor, Tensor]:
    """From (N, H, max_q, D_v) and (N, H, max_q) to (T_q, H, D_v) and (H, T_q); rows behind the last sequence are dead."""
    row = torch.arange(query.shape[0], device=query.device)
    before = (row[:, None] >= layout.cu_seq_q[None, 1:]).sum(1)  # how many sequences have ended
    sequence = before.clamp(max=lse.shape[0] - 1)
    number = (row - layout.cu_seq_q[:-1][sequence]).clamp(max=lse.shape[2] - 1)
    behind = before == lse.shape[0]
    out = padded[sequence, :, number].masked_fill(behind[:, None, None], 0.0).to(query.dtype)
    return out, lse[sequence, :, number].masked_fill(behind[:, None], -math.inf).t().contiguous()


def plan_static(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``varlen_inductor::plan_static`` without writes: gathers and sums only."""
    flat = mask.reshape(-1)
    rank = flat.to(torch.int64).cumsum(0)
    positions = torch.arange(flat.shape[0], device=mask.device)
    count = rank[-1:]
    target = torch.where(flat, rank - 1, count + positions - rank)
    order = torch.empty_like(positions).scatter(0, target, positions)
    index = torch.where(positions < count, order, order[:1])
    inverse = torch.where(flat, rank - 1, torch.where(count > 0, -1, -1 - flat.shape[0]))
    # The sum over the rows before each, and not a running sum with a zero in front, which Inductor has miscompiled.
    row = torch.arange(mask.shape[0] + 1, device=mask.device)
    cu_seqlens = torch.where(row[:-1] < row[:, None], mask.sum(1), 0).sum(1).to(torch.int32)
    return index, inverse, cu_seqlens
