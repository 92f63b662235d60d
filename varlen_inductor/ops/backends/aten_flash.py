"""CUDA: the FlashAttention 2 kernels that come with PyTorch.

They want half precision, one head dim for query, key and value, a multiple of 8 and at most 256 (others are padded with zeros,
which changes no score and no sum), and know neither of positions nor of a gradient through lse (computed here with a second
call). Rows behind the last sequence they leave uninitialised, and lse of a query without keys is +inf.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.backends.rows import finish_backward, finish_forward
from varlen_inductor.ops.problem import Layout, Problem, Rule

_flash = torch.ops.aten._flash_attention_forward.default
_flash_backward = torch.ops.aten._flash_attention_backward.default

MAX_HEAD_DIM = 256
MAX_SEQUENCES = 65535
"""The kernels' grid has a dimension for sequences; CUDA allows no more."""


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
    dim, dim_v = _kernel_head_dim(query, value), value.shape[2]
    # The backward knows no used keys: where it must draw the same dropout it needs the same sequences.
    layout = _contiguous(_without_used(layout, key.shape[0]) if rule.dropout_p > 0.0 else layout)
    out, lse, rng_state = _run(_ready(query, dim), _ready(key, dim), _ready(value, dim), layout, rule)
    out = out[..., :dim_v].contiguous()
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
    dim = _kernel_head_dim(query, value)
    layout = _contiguous(_without_used(layout, key.shape[0]))
    q, k, v, o, g = (_ready(x, dim) for x in (query, key, value, out, grad_out))
    grad_query, grad_key, grad_value = _run_backward(g, q, k, v, o, lse, rng_state, layout, rule)
    if grad_lse is not None:
        more_query, more_key = _through_lse(grad_lse, q, k, lse, layout, rule)
        grad_query, grad_key = grad_query + more_query, grad_key + more_key
    grads = (
        grad_query[..., : query.shape[2]].contiguous(),
        grad_key[..., : key.shape[2]].contiguous(),
        grad_value[..., : value.shape[2]].contiguous(),
    )
    if not layout.tails_unread:
        finish_backward(grads, layout.cu_seq_q, layout.cu_seq_k)
    return grads


def _run(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    max_q, max_k = _bounds(query, key, layout, rule)
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
    max_q, max_k = _bounds(query, key, layout, rule)
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


def _through_lse(grad_lse: Tensor, query: Tensor, key: Tensor, lse: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor]:
    """What lse adds to the gradients of query and key.

    With weights P (before dropout) the scores have the gradient P · g, where g is that of lse, so query gets scale · g · (P K):
    attention with the keys for values. Key gets Pᵀ (scale · g · Q): what the values would get if their output had the
    gradient scale · g · Q.
    """
    plain = rule._replace(dropout_p=0.0)
    weighted_keys, _, rng_state = _run(query, key, key, layout, plain)
    g = (grad_lse * rule.scale).t().unsqueeze(-1)
    _, _, grad_key = _run_backward((g * query).to(query.dtype), query, key, key, weighted_keys, lse, rng_state, layout, plain)
    return (g * weighted_keys).to(query.dtype), grad_key


def _kernel_head_dim(query: Tensor, value: Tensor) -> int:
    return -(-max(query.shape[2], value.shape[2]) // 8) * 8


def _ready(x: Tensor, dim: int) -> Tensor:
    """With head dim ``dim``, and aligned as the kernels read it: 16 bytes at a time."""
    if x.shape[2] != dim:
        return pad(x, (0, dim - x.shape[2]))
    aligned = x.stride(2) == 1 and x.stride(1) % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _contiguous(layout: Layout) -> Layout:
    cu_seq_q, cu_seq_k, seqused_k = layout.cu_seq_q, layout.cu_seq_k, layout.seqused_k
    if cu_seq_q.shape[0] - 1 > MAX_SEQUENCES:
        raise RuntimeError(f"cu_seq_q has {cu_seq_q.shape[0] - 1} sequences; the kernels take {MAX_SEQUENCES}: split the batch")
    if cu_seq_q.is_contiguous() and cu_seq_k.is_contiguous() and (seqused_k is None or seqused_k.is_contiguous()):
        return layout
    return layout._replace(
        cu_seq_q=cu_seq_q.contiguous(),
        cu_seq_k=cu_seq_k.contiguous(),
        seqused_k=None if seqused_k is None else seqused_k.contiguous(),
    )


def _without_used(layout: Layout, key_tokens: int) -> Layout:
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


def _bounds(query: Tensor, key: Tensor, layout: Layout, rule: Rule) -> tuple[int, int]:
    """``max_q`` and ``max_k`` as the kernels must have them."""
    max_q, max_k = max(layout.max_q, 1), max(layout.max_k, 1)
    if max_q == 1 and query.shape[1] != key.shape[1]:
        max_q = 2  # with 1 and shared heads they take for granted that every sequence has exactly one query
    if rule.windowed and rule.window_right != 0:
        # They take a right side of max_k for unbounded and the other way round; with more queries than keys that hides keys.
        max_k = max(max_k, max_q)
    return max_q, max_k


BACKEND = Backend("aten_flash", supports, forward, backward)
