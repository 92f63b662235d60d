"""What compiled code calls in place of the operators: the same arguments, real tensors, no dispatcher.

The graph was checked when it was traced, and autograd and autocast were applied then.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from varlen_inductor import config
from varlen_inductor.ops.attention import run_backward, run_forward, split_arguments
from varlen_inductor.ops.validate import check_lengths


def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``varlen_inductor::varlen_attn``."""
    layout, rule, kernels = split_arguments(query, *args, **options)
    if config.debug:
        check_lengths(layout, query, key)
    return run_forward(query, key, value, layout, rule, kernels or config.kernels)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``varlen_inductor::varlen_attn_backward``."""
    layout, rule, kernels = split_arguments(query, *args, **options)
    kernels = kernels or config.kernels
    return run_backward(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule, kernels)
