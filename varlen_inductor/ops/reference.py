"""What ``varlen_attn`` means, written to be read: every kernel is tested against this. Differentiable; no dropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def varlen_attn_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    seqused_k: Tensor | None = None,
    position_q: Tensor | None = None,
    position_k: Tensor | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention computed in ``dtype``: out (T_q, H, D_v) and lse (H, T_q). Arguments as for the operator."""
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = 1.0 / math.sqrt(query.shape[2]) if scale is None else scale
    out = [query.new_zeros(0, heads, value.shape[2])]
    lse = [query.new_zeros(heads, 0)]
    for i in range(cu_seq_q.numel() - 1):
        rows_q = torch.arange(int(cu_seq_q[i]), int(cu_seq_q[i + 1]), device=query.device)
        rows_k = torch.arange(int(cu_seq_k[i]), int(cu_seq_k[i + 1]), device=query.device)
        if seqused_k is not None:
            rows_k = rows_k[: int(seqused_k[i])]
        if position_q is None or position_k is None:
            at_q = torch.arange(len(rows_q), device=query.device) + len(rows_k) - len(rows_q)
            at_k = torch.arange(len(rows_k), device=query.device)
        else:
            at_q, at_k = position_q[rows_q], position_k[rows_k]
        visible = _visible(at_q[:, None], at_k[None, :], *window_size)
        sequence_out, sequence_lse = _attend(query[rows_q], key[rows_k], value[rows_k], visible, scale, softcap)
        out.append(sequence_out)
        lse.append(sequence_lse)
    tail = query.shape[0] - int(cu_seq_q[-1])
    out.append(query.new_zeros(tail, heads, value.shape[2]))
    lse.append(query.new_full((heads, tail), -math.inf))
    return torch.cat(out), torch.cat(lse, 1)


def _visible(at_q: Tensor, at_k: Tensor, left: int, right: int) -> Tensor:
    visible = torch.ones_like(at_q - at_k, dtype=torch.bool)
    if left >= 0:
        visible = visible & (at_k >= at_q - left)
    if right >= 0:
        visible = visible & (at_k <= at_q + right)
    return visible


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """One sequence: (q, H, D), (k, H, D), (k, H, D_v), (q, k) → (q, H, D_v), (H, q)."""
    sees_a_key = visible.any(1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if softcap > 0.0:
        scores = softcap * (scores / softcap).tanh()
    # A query that sees no key is computed as if it saw all, then overwritten, so that no gradient becomes NaN.
    scores = scores.masked_fill(~(visible | ~sees_a_key[:, None]), -math.inf)
    lse = scores.logsumexp(2)
    out = torch.einsum("hqk,khd->qhd", (scores - lse[..., None]).exp(), value)
    return out.masked_fill(~sees_a_key[:, None, None], 0.0), lse.masked_fill(~sees_a_key, -math.inf)
