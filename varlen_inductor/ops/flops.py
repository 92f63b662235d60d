"""How many floating point operations ``varlen_attn`` is, for ``torch.utils.flop_counter``.

As PyTorch counts attention: two matrix products forward and five backward, a mask or a window saving nothing. Only the lengths
that sequences really have count; under a fake mode they are unknown and ``max_q`` and ``max_k`` stand for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from varlen_inductor.ops import attention, into, joined  # noqa: F401  (defines the operators)

_ops = torch.ops.varlen_inductor


@register_flop_formula([_ops.varlen_attn, _ops.varlen_attn_drawn], get_raw=True)
def forward_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *args: Any,
    seqused_k: Tensor | None = None,
    **options: Any,
) -> int:
    """Scores, then the weighted sum of values."""
    pairs = _pairs(cu_seq_q, cu_seq_k, max_q, max_k, seqused_k)
    return 2 * query.shape[1] * pairs * (query.shape[2] + value.shape[-1])


@register_flop_formula(_ops.varlen_attn_out, get_raw=True)
def out_flops(out: Tensor, *args: Any, **options: Any) -> int:
    """Those of the forward."""
    return forward_flops(*args, **options)


@register_flop_formula([_ops.varlen_attn_backward, _ops.varlen_attn_backward_joined], get_raw=True)
def backward_flops(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *args: Any,
    seqused_k: Tensor | None = None,
    **options: Any,
) -> int:
    """The scores again, the gradient of the weights, and that of query, key and value."""
    pairs = _pairs(cu_seq_q, cu_seq_k, max_q, max_k, seqused_k)
    return 2 * query.shape[1] * pairs * (3 * query.shape[2] + 2 * value.shape[2])


def _pairs(cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, seqused_k: Tensor | None) -> int:
    """How many pairs of a query and a key of its sequence there are."""
    lengths_k = _lengths(cu_seq_k, max_k) if seqused_k is None or _unknown(seqused_k) else seqused_k.tolist()
    return sum(q * k for q, k in zip(_lengths(cu_seq_q, max_q), lengths_k, strict=True))


def _lengths(offsets: Tensor, longest: int) -> Iterator[int]:
    if _unknown(offsets):
        return iter([longest] * (offsets.shape[0] - 1))
    return iter(offsets.diff().tolist())


def _unknown(x: Tensor) -> bool:
    """Whether it is fake, functional or meta: without data, or with a wrapper around it."""
    return type(x) is not Tensor or x.device.type == "meta"
