"""Which calls of the Triton kernels launch the same but for addresses, so that a launch that was prepared is made again.

All that a compiled kernel, its grid and its other arguments depend on is in the kind of a call: one look in a dictionary, where a
look at each argument takes longer than the launch. Calls that packed graphs do not make have none, and are looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varlen_inductor.ops.problem import Layout, Rule


def usual_forward(
    out: Tensor,
    lse: Tensor | None,
    rng_state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
) -> tuple[Any, ...] | None:
    """Of a forward as packed graphs have it: all that its launch depends on but addresses, then these; ``None`` of any other.

    The dtypes of what comes with query are known, and its addresses are multiples of 16. (Of ``rng_state`` nothing is asked: its
    alignment makes no difference.)
    """
    cu_q, cu_k, max_q, _, seqused_k, position_q, _, _, table, _, seeds_at, _ = layout
    if seqused_k is not None or position_q is not None or table is not None or rule.scale <= 0.0:
        return None
    dtype = query.dtype
    if dtype == torch.float32 or not (cu_q.is_contiguous() and cu_k.is_contiguous()):
        return None  # how float32 is multiplied depends on a setting
    at_query, at_key, at_value, at_out = query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr()
    at_q, at_k, at_lse, at_rng = cu_q.data_ptr(), cu_k.data_ptr(), None, None
    together = at_query | at_key | at_value | at_out | at_q | at_k
    if lse is not None:
        at_lse = lse.data_ptr()
        together |= at_lse
    if rng_state is not None:
        if rng_state.stride() != (1,):
            return None
        at_rng = rng_state.data_ptr() + 8 * seeds_at
    if together & 15:
        return None
    sizes = (query.shape, value.shape, cu_q.numel())  # which tell key's
    strides = (query.stride(), key.stride(), value.stride(), out.stride())
    kind = (query.get_device(), dtype, sizes, strides, rule, max_q, at_lse is None)
    return kind, at_query, at_key, at_value, at_out, at_lse, at_q, at_k, at_rng


def usual_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
) -> tuple[Any, ...] | None:
    """Of a backward as packed graphs have it: all that its launches depend on but addresses, then these; ``None`` of any other."""
    of_forward = usual_forward(out, lse, None if rule.dropout_p == 0.0 else rng_state, query, key, value, layout, rule)
    if of_forward is None or not lse.is_contiguous():
        return None
    kind, at_query, at_key, at_value, at_out, at_lse, at_q, at_k, at_rng = of_forward
    grad_query, grad_key, grad_value = grads
    at_grad = grad_out.data_ptr()
    at_grads = grad_query.data_ptr(), grad_key.data_ptr(), grad_value.data_ptr()
    if (at_grad | at_grads[0] | at_grads[1] | at_grads[2]) & 15:
        return None
    strides = (grad_out.stride(), grad_query.stride(), grad_key.stride(), grad_value.stride())
    kind = (kind, strides, layout.max_k, grad_out.dtype, out.dtype, lse.dtype)
    return kind, at_out, at_grad, at_query, at_key, at_value, at_lse, at_grads, at_q, at_k, at_rng
