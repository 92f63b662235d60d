"""Registers ``varlen_inductor::varlen_attn_out``: the forward of ``varlen_attn`` into a tensor that is there. It has no gradient.

The arguments are those of ``varlen_attn`` behind ``out`` (T_q, H, D_v), without dropout; the result is lse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varlen_inductor.ops.attention import (
    LIBRARY,
    OPERANDS,
    OPTIONS,
    TAGS,
    debug,
    default_kernels,
    nothing_to_attend,
    run_forward,
    split_arguments,
)
from varlen_inductor.ops.backends import choose, fallback
from varlen_inductor.ops.problem import Layout, Problem, Rule, lse_dtype
from varlen_inductor.ops.validate import check_lengths, check_operands, check_out

_OPTIONS = OPTIONS.replace("float dropout_p=0.0, ", "")
LIBRARY.define(f"varlen_attn_out(Tensor(a!) out, {OPERANDS}, {_OPTIONS}) -> Tensor lse", tags=TAGS)
varlen_attn_out = torch.ops.varlen_inductor.varlen_attn_out.default


def run_forward_into(out: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, kernels: str) -> Tensor:
    """``run_forward`` into ``out``, directly if the backend can."""
    problem = Problem.of(query, key, value, layout, rule)
    if not nothing_to_attend(query, key, layout):
        choice = choose(problem, kernels, False, fallback.failed(problem, False))
        if choice.backend.forward_into is not None and not choice.gathers and out.stride(2) == 1:
            try:
                lse = choice.backend.forward_into(out, query, key, value, layout, rule)
                torch.autograd.graph.increment_version(out)
                return lse
            except Exception as error:
                fallback.note(error, choice.backend, problem, kernels, False)
    result, lse, _ = run_forward(query, key, value, layout, rule, kernels, problem)
    out.copy_(result)
    return lse


def _forward(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    layout, rule, kernels = split_arguments(query, *args, **options)
    check_operands(query, key, value, layout, rule)
    check_out(out, query, value)
    if debug():
        check_lengths(layout, query, key)
    return run_forward_into(out, query, key, value, layout, rule, default_kernels() if kernels is None else kernels)


def _fake(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    layout, rule, _ = split_arguments(query, *args, **options)
    check_operands(query, key, value, layout, rule)
    check_out(out, query, value)
    return query.new_empty((query.shape[1], query.shape[0]), dtype=lse_dtype(query.dtype))


LIBRARY.impl("varlen_attn_out", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("varlen_inductor::varlen_attn_out", _fake, lib=LIBRARY)
