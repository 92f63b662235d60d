"""CUDA: the FlashAttention 2 kernels that come with PyTorch.

They want half precision, one head dim for query, key and value, a multiple of 8 and at most 256 (others are padded with zeros,
which changes no score and no sum), and know neither of positions nor of a gradient through lse (computed here with a second
call). Rows behind the last sequence they leave uninitialised, and lse of a query without keys is +inf.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.backends.flash_common import (
    MAX_HEAD_DIM,
    MAX_SEQUENCES,
    bounds_of_flash2,
    contiguous,
    kernel_head_dim,
    narrowed,
    ready,
    through_lse,
    without_used,
)
from varlen_inductor.ops.backends.rows import finish_backward, finish_forward
from varlen_inductor.ops.problem import Layout, Problem, Rule

_flash = torch.ops.aten._flash_attention_forward.default
_flash_backward = torch.ops.aten._flash_attention_backward.default


def supports(problem: Problem) -> str | None:
    """Why the kernels cannot run the problem, or ``None``."""
    if problem.device.type != "cuda":
        return "it runs on CUDA only"
    unavailable = _unavailable(problem.device)
    if unavailable is not None:
        return unavailable
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, not {problem.dtype}"
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return f"its head dim is at most {MAX_HEAD_DIM}, not {max(problem.head_dim, problem.head_dim_v)}"
    if problem.positions and problem.windowed:
        return "a window that speaks of positions is unknown to it"
    if problem.softcap > 0.0:
        return "PyTorch passes no softcap on to it"
    if problem.paged:
        return "it does not read pages where they lie"
    if problem.dropout_p == 1.0:
        return "it cannot drop everything"
    return None


@cache
def _unavailable(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it is not tested on ROCm"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without FlashAttention"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, and this device has {major}.{minor}"


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every sequence; see ``Forward``."""
    dim, dim_v = kernel_head_dim(query, value), value.shape[2]
    # The backward knows no used keys: where it must draw the same dropout it needs the same sequences.
    layout = contiguous(without_used(layout, key.shape[0]) if rule.dropout_p > 0.0 else layout, MAX_SEQUENCES)
    out, lse, rng_state = _run(ready(query, dim), ready(key, dim), ready(value, dim), layout, rule)
    out = narrowed(out, dim_v)
    if not layout.tails_unread:
        finish_forward(out, lse, layout.cu_seq_q)
    return out, lse, rng_state if rule.dropout_p > 0.0 else rng_state.new_empty(0)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; see ``Backward``."""
    dim = kernel_head_dim(query, value)
    layout = contiguous(without_used(layout, key.shape[0]), MAX_SEQUENCES)
    q, k, v, o, g = (ready(x, dim) for x in (query, key, value, out, grad_out))
    grad_query, grad_key, grad_value = _run_backward(g, q, k, v, o, lse, rng_state, layout, rule)
    if grad_lse is not None:
        more_query, more_key = through_lse(_run, _run_backward, grad_lse, q, k, lse, layout, rule)
        grad_query, grad_key = grad_query + more_query, grad_key + more_key
    grads = (
        narrowed(grad_query, query.shape[2]),
        narrowed(grad_key, key.shape[2]),
        narrowed(grad_value, value.shape[2]),
    )
    if not layout.tails_unread:
        finish_backward(grads, layout.cu_seq_q, layout.cu_seq_k)
    return grads


def _run(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    max_q, max_k = bounds_of_flash2(query, key, layout, rule)
    out, lse, rng_state, _, _ = _flash(
        query,
        key,
        value,
        layout.cu_seq_q,
        layout.cu_seq_k,
        max_q,
        max_k,
        rule.dropout_p,
        rule.causal,
        False,
        scale=rule.scale,
        window_size_left=rule.window_left,
        window_size_right=rule.window_right,
        seqused_k=layout.seqused_k,
    )
    return out, lse, rng_state


def _run_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    layout: Layout,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    max_q, max_k = bounds_of_flash2(query, key, layout, rule)
    return _flash_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        layout.cu_seq_q,
        layout.cu_seq_k,
        max_q,
        max_k,
        rule.dropout_p,
        rule.causal,
        rng_state,
        rng_state,  # not used by these kernels
        scale=rule.scale,
        window_size_left=rule.window_left,
        window_size_right=rule.window_right,
    )


BACKEND = Backend("aten_flash", supports, forward, backward)
