"""What the FlashAttention kernels want of their operands, whichever package they come from.

All of them read 16 bytes at a time, take head dims that are multiples of 8 (padding with zeros changes no score and no sum), lay
lse out as (H, T_q), leave the rows behind the last sequence as the allocator gave them, and scale a score after they have taken
the largest, so that the scale must be positive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from varlen_inductor.ops.problem import Layout, Rule

MAX_HEAD_DIM = 256
MAX_SEQUENCES = 65535
"""The grid of FlashAttention 2 has a dimension for sequences; CUDA allows no more."""

Run = Callable[[Tensor, Tensor, Tensor, Layout, Rule], tuple[Tensor, Tensor, Tensor]]
"""``(query, key, value, layout, rule) -> (out, lse, rng_state)``: the kernel alone."""

RunBackward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Layout, Rule],
    tuple[Tensor, Tensor, Tensor],
]
"""``(grad_out, query, key, value, out, lse, rng_state, layout, rule) -> grads``: the kernel alone."""


def kernel_head_dim(query: Tensor, value: Tensor) -> int:
    """The one head dim that query, key and value get."""
    return -(-max(query.shape[2], value.shape[2]) // 8) * 8


def ready(x: Tensor, dim: int) -> Tensor:
    """With head dim ``dim``, and aligned as the kernels read it: 16 bytes at a time."""
    if x.shape[2] != dim:
        return pad(x, (0, dim - x.shape[2]))
    aligned = x.stride(2) == 1 and x.stride(1) % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def narrowed(x: Tensor, dim: int) -> Tensor:
    """The first ``dim`` columns, contiguous."""
    return x if x.shape[2] == dim and x.is_contiguous() else x[..., :dim].contiguous()


def contiguous(layout: Layout, most_sequences: int | None = None) -> Layout:
    """The same with contiguous offsets.

    Raises:
        RuntimeError: there are more than ``most_sequences`` sequences.
    """
    cu_seq_q, cu_seq_k, seqused_k = layout.cu_seq_q, layout.cu_seq_k, layout.seqused_k
    if most_sequences is not None and cu_seq_q.shape[0] - 1 > most_sequences:
        raise RuntimeError(f"cu_seq_q has {cu_seq_q.shape[0] - 1} sequences; the kernels take {most_sequences}: split the batch")
    if cu_seq_q.is_contiguous() and cu_seq_k.is_contiguous() and (seqused_k is None or seqused_k.is_contiguous()):
        return layout
    return layout._replace(
        cu_seq_q=cu_seq_q.contiguous(),
        cu_seq_k=cu_seq_k.contiguous(),
        seqused_k=None if seqused_k is None else seqused_k.contiguous(),
    )


def without_used(layout: Layout, key_tokens: int) -> Layout:
    """The same without ``seqused_k``: each sequence is followed by one that has its unused keys and no queries."""
    if layout.seqused_k is None:
        return layout
    cu_seq_q, cu_seq_k, used = layout.cu_seq_q, layout.cu_seq_k, layout.seqused_k
    ends_k = torch.stack((cu_seq_k[:-1] + used, cu_seq_k[1:]), 1).flatten()
    return layout._replace(
        cu_seq_q=torch.cat((cu_seq_q[:1], cu_seq_q[1:].repeat_interleave(2))),
        cu_seq_k=torch.cat((cu_seq_k[:1], ends_k)),
        max_k=key_tokens,  # nothing else bounds how many are unused
        seqused_k=None,
    )


def bounds_of_flash2(query: Tensor, key: Tensor, layout: Layout, rule: Rule) -> tuple[int, int]:
    """``max_q`` and ``max_k`` as the kernels of FlashAttention 2 must have them."""
    max_q, max_k = max(layout.max_q, 1), max(layout.max_k, 1)
    if max_q == 1 and query.shape[1] != key.shape[1]:
        max_q = 2  # with 1 and shared heads they take for granted that every sequence has exactly one query
    if rule.windowed and rule.window_right != 0:
        # They take a right side of max_k for unbounded and the other way round; with more queries than keys that hides keys.
        max_k = max(max_k, max_q)
    return max_q, max_k


def positive_scale(query: Tensor, rule: Rule) -> tuple[Tensor, Rule, float]:
    """The query and the rule with a scale above 0, and what the gradient of the new query must be multiplied by."""
    if rule.scale > 0.0:
        return query, rule, 1.0
    if rule.scale < 0.0:
        return -query, rule._replace(scale=-rule.scale), -1.0
    return torch.zeros_like(query), rule._replace(scale=1.0), 0.0


def through_lse(
    run: Run, run_backward: RunBackward, grad_lse: Tensor, query: Tensor, key: Tensor, lse: Tensor, layout: Layout, rule: Rule
) -> tuple[Tensor, Tensor]:
    """What lse adds to the gradients of query and key, by kernels that know no gradient of lse.

    With weights P (before dropout) the scores have the gradient P · g, where g is that of lse, so query gets scale · g · (P K):
    attention with the keys for values. Key gets Pᵀ (scale · g · Q): what the values would get if their output had the
    gradient scale · g · Q.
    """
    plain = rule._replace(dropout_p=0.0)
    weighted_keys, _, rng_state = run(query, key, key, layout, plain)
    g = (grad_lse * rule.scale).t().unsqueeze(-1)
    _, _, grad_key = run_backward((g * query).to(query.dtype), query, key, key, weighted_keys, lse, rng_state, layout, plain)
    return (g * weighted_keys).to(query.dtype), grad_key
