"""``varlen_attn`` in eager mode, past PyTorch's dispatcher where that would only pass the call on.

With short sequences a call is bound by what Python does around the kernel, and the dispatcher is the largest part of that. Nothing
is lost without it if nobody records, transforms or casts: `_compat_operators.goes_straight` says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varlen_inductor import _compat_operators
from varlen_inductor.ops.attention import debug, default_kernels, kernel_of_both, nothing_to_attend, run_forward, through_backward
from varlen_inductor.ops.problem import Layout, Problem, Rule, must_be_deterministic
from varlen_inductor.ops.validate import check_lengths, check_operands


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, want_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """What the operator returns but for ``rng_state``, and with its checks and gradients; lse only on request."""
    check_operands(query, key, value, layout, rule)
    if debug():
        check_lengths(layout, query, key)
    if torch.is_grad_enabled() and _compat_operators.any_requires_grad(query, key, value):
        return _Attention.apply(layout, rule, default_kernels(), want_lse, query, key, value)  # type: ignore[no-any-return]
    out, lse, _ = run_forward(query, key, value, layout, rule, default_kernels())
    return (out, lse) if want_lse else out


class _Attention(torch.autograd.Function):
    """The gradient. What is no operand comes as it is, for each argument costs time, and is saved with them against changes."""

    @staticmethod
    def forward(
        ctx: Any, layout: Layout, rule: Rule, kernels: str, want_lse: bool, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        problem = Problem.of(query, key, value, layout, rule)
        if rule.dropout_p > 0.0 and not nothing_to_attend(query, key, layout):
            kernels = kernel_of_both(problem, kernels)
        out, lse, rng_state = run_forward(query, key, value, layout, rule, kernels, problem)
        others = [x for x in layout[4:7] if x is not None]
        # As many as the operator saves, so that a checkpoint may be recomputed by the other way.
        ctx.save_for_backward(out, lse, rng_state, query, key, value, layout.cu_seq_q, layout.cu_seq_k, *others)
        ctx.call = layout, rule, kernels, problem
        ctx.set_materialize_grads(False)
        return (out, lse) if want_lse else out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        layout, rule, kernels, problem = ctx.call
        out, lse, rng_state, query, key, value, *_ = ctx.saved_tensors
        # With dropout only the kernel of the forward can draw again what it drew.
        if problem.dropout_p == 0.0 and problem.deterministic != must_be_deterministic():
            problem = problem._replace(deterministic=not problem.deterministic)
        operands = (out, lse, rng_state, query, key, value)
        return None, None, None, None, *through_backward(grad_out, grad_lse, *operands, layout, rule, kernels, problem)
