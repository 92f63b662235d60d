"""The CPU: PyTorch's flash attention for each sequence where it applies, otherwise the same in PyTorch operations.

PyTorch's kernel knows one batch of equally long sequences, no dropout, no softcap, one head dim, and causality only between as many
queries as keys. Neighbouring sequences of equal length go through it together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_inductor.ops.backends import math
from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.backends.sequences import Run, runs
from varlen_inductor.ops.problem import UNBOUNDED, Layout, Problem, Rule, lse_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

HALF_BACKWARD_KEYS = 384
"""Up to so many keys, PyTorch's backward in half precision takes longer than casting to float32 and back (with AMX)."""


def supports(problem: Problem) -> str | None:
    """Why it cannot run the problem, or ``None``."""
    if problem.device.type != "cpu":
        return "it runs on the CPU only"
    return "it does not read pages where they lie" if problem.paged else None


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every sequence; see ``Forward``."""
    query, key, value = (_last_dim_contiguous(x) for x in (query, key, value))
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=lse_dtype(query.dtype))
    rng_state = math.new_rng_state(rule.dropout_p, query.device)
    generator = math.replay(rng_state)
    one_head_dim = query.shape[2] == value.shape[2]
    written = 0
    for run in runs(layout):
        _no_keys(out, lse, slice(written, run.q_start))
        written = run.q_rows.stop
        causal = _flash_causal(run, layout, rule) if one_head_dim else None
        if run.k_len == 0:
            _no_keys(out, lse, run.q_rows)
        elif causal is None:
            math.run_forward(run, query, key, value, out, lse, layout, rule, generator)
        else:
            _flash_forward(run, query, key, value, out, lse, causal, rule.scale)
    _no_keys(out, lse, slice(written, None))
    return out, lse, rng_state


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
    grads = query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    _differentiate(grads, grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule)
    return grads


def backward_into(
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
) -> None:
    """The same into ``grads``; see ``BackwardInto``."""
    for grad in grads:
        grad.zero_()
    _differentiate(grads, grad_out, None, out, lse, rng_state, query, key, value, layout, rule)


def _differentiate(
    grads: tuple[Tensor, Tensor, Tensor],
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
) -> None:
    """Writes ``grads``, which are zeros, where a query sees keys."""
    grad_out, query, key, value = (_last_dim_contiguous(x) for x in (grad_out, query, key, value))
    generator = math.replay(rng_state)
    # PyTorch's kernel takes no gradient for its lse.
    flash = query.shape[2] == value.shape[2] and grad_lse is None
    for run in runs(layout):
        causal = _flash_causal(run, layout, rule) if flash else None
        if run.k_len == 0:
            continue
        if causal is None:
            math.run_backward(run, grad_out, grad_lse, lse, query, key, value, grads, layout, rule, generator)
        else:
            _flash_run_backward(run, grad_out, out, lse, query, key, value, grads, causal, rule.scale)


def _flash_causal(run: Run, layout: Layout, rule: Rule) -> bool | None:
    """The ``is_causal`` with which PyTorch's kernel computes this run, or ``None`` if it cannot."""
    if rule.dropout_p > 0.0 or rule.softcap > 0.0:
        return None
    if layout.position_q is not None and rule.windowed:
        return None
    left_open = rule.window_left == UNBOUNDED or rule.window_left >= run.k_len - 1
    right_open = rule.window_right == UNBOUNDED or rule.window_right >= run.q_len - 1
    if left_open and right_open:
        return False
    return True if left_open and rule.window_right == 0 and run.q_len == run.k_len else None


def _flash_forward(
    run: Run, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> None:
    groups = query.shape[1] // key.shape[1]
    run_out, run_lse = _flash(
        run.queries(query).transpose(1, 2),
        _shared_heads(run.keys(key), groups),
        _shared_heads(run.keys(value), groups),
        0.0,
        causal,
        scale=scale,
    )
    run.queries(out).copy_(run_out.transpose(1, 2))
    run.queries(lse.t()).copy_(run_lse.transpose(1, 2))


def _flash_run_backward(
    run: Run,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    causal: bool,
    scale: float,
) -> None:
    groups = query.shape[1] // key.shape[1]
    operands = [run.queries(x).transpose(1, 2) for x in (grad_out, query, out)]
    operands += [_shared_heads(run.keys(x), groups) for x in (key, value)]
    if run.k_len <= HALF_BACKWARD_KEYS and query.dtype in (torch.bfloat16, torch.float16):
        operands = [x.float() for x in operands]
    g, q, o, k, v = operands
    run_lse = run.queries(lse.t()).transpose(1, 2)
    grad_query, grad_key, grad_value = _flash_backward(g, q, k, v, o, run_lse, 0.0, causal, scale=scale)
    run.queries(grads[0]).copy_(grad_query.transpose(1, 2))
    run.keys(grads[1]).copy_(_sum_shared_heads(grad_key, groups))
    run.keys(grads[2]).copy_(_sum_shared_heads(grad_value, groups))


def _shared_heads(rows: Tensor, groups: int) -> Tensor:
    """(count, rows, H_k, D) → (count, H, rows, D): PyTorch's kernel wants a key head for each query head."""
    by_head = rows.transpose(1, 2)
    return by_head if groups == 1 else by_head.repeat_interleave(groups, dim=1)


def _sum_shared_heads(grad: Tensor, groups: int) -> Tensor:
    """The adjoint of ``_shared_heads``."""
    by_row = grad.transpose(1, 2)
    return by_row if groups == 1 else by_row.unflatten(2, (-1, groups)).sum(3)


def _no_keys(out: Tensor, lse: Tensor, rows: slice) -> None:
    """Writes what a query has that sees no key."""
    if rows.stop is None or rows.start < rows.stop:
        out[rows] = 0.0
        lse[:, rows] = float("-inf")


def _last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


BACKEND = Backend("cpu", supports, forward, backward, backward_into=backward_into, reads_lengths=True)
