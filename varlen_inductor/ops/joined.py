"""Registers ``varlen_inductor::varlen_attn_backward_joined``: ``varlen_attn_backward`` with one tensor for its three gradients.

A model with one projection for query, key and value wants the gradient of that projection's result. Kernels that can
(``Backend.backward_into``) write straight into it; for the others the three gradients are concatenated.

The arguments are those of ``varlen_attn_backward``, with as many key rows as query rows. The result is contiguous,
(T, H * D + H_k * D + H_k * D_v): row t holds grad_query[t], then grad_key[t], then grad_value[t].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from varlen_inductor import _compat_operators
from varlen_inductor.ops.attention import (
    LIBRARY,
    OF_GRAPHS,
    OPERANDS,
    OPTIONS,
    TAGS,
    default_kernels,
    drawn_from,
    nothing_to_attend,
    split_arguments,
    without_double_backward,
)
from varlen_inductor.ops.backends import choose, fallback
from varlen_inductor.ops.backends.base import Backend, lse_for
from varlen_inductor.ops.backends.memory import empty
from varlen_inductor.ops.problem import Layout, Problem, Rule
from varlen_inductor.ops.validate import check_seeds

LIBRARY.define(
    "varlen_attn_backward_joined(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor rng_state, "
    f"{OPERANDS}, {OPTIONS}, {OF_GRAPHS}) -> Tensor grads",
    tags=TAGS,
)
varlen_attn_backward_joined = torch.ops.varlen_inductor.varlen_attn_backward_joined.default

_ALIGNMENT = 16


def run_backward_joined(
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
    kernels: str,
    problem: Problem | None = None,
) -> Tensor:
    """``run_backward`` with its results in one tensor."""
    if nothing_to_attend(query, key, layout):
        return query.new_zeros(query.shape[0], _width(query, key, value))
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(lse == -math.inf, 0.0)  # as in run_backward
    problem = problem or Problem.of(query, key, value, layout, rule)
    backend = choose(problem, kernels, True, fallback.failed(problem, True)).backend
    try:
        return backward_joined_by(backend, grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule)
    except Exception as error:
        fallback.note(error, backend, problem, kernels, True)
    return run_backward_joined(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule, kernels, problem)


def backward_joined_by(
    backend: Backend,
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
) -> Tensor:
    """The joined gradients by one backend, written in place if it can. ``grad_lse`` is 0 where lse is -inf."""
    grad_lse, lse, layout = lse_for(backend, grad_lse, lse, layout)
    if grad_lse is None and backend.backward_into is not None:
        (rows, heads, dim), (_, heads_k, dim_v), size = query.shape, value.shape, query.element_size()
        of_query, of_key, of_value = heads * dim, heads_k * dim, heads_k * dim_v
        if not (of_query * size % _ALIGNMENT or of_key * size % _ALIGNMENT or of_value * size % _ALIGNMENT):
            width = of_query + of_key + of_value
            joined = empty(query, rows, width)
            grads = (
                _compat_operators.reinterpret(joined, (rows, heads, dim), (width, dim, 1), 0),
                _compat_operators.reinterpret(joined, (rows, heads_k, dim), (width, dim, 1), of_query),
                _compat_operators.reinterpret(joined, (rows, heads_k, dim_v), (width, dim_v, 1), of_query + of_key),
            )
            backend.backward_into(grads, grad_out, out, lse, rng_state, query, key, value, layout, rule)
            return joined
    apart = backend.backward(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule)
    return torch.cat([grad.flatten(1) for grad in apart], 1)


def _width(query: Tensor, key: Tensor, value: Tensor) -> int:
    return sum(x.shape[1] * x.shape[2] for x in (query, key, value))


def _check_rows(query: Tensor, key: Tensor) -> None:
    """Raises ``RuntimeError`` if there are not as many query rows as key rows; where that is not known yet, it is asserted."""
    torch._check(
        query.shape[0] == key.shape[0],
        lambda: (
            f"varlen_attn_backward_joined: query has {query.shape[0]} rows and key {key.shape[0]}; gradients can be joined only if "
            "there are as many of both (use varlen_attn_backward)"
        ),
    )


def _backward(
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
) -> Tensor:
    layout, rule, kernels = split_arguments(query, *args, **options)
    _check_rows(query, key)
    kernels, layout = default_kernels() if kernels is None else kernels, drawn_from(rng_state, layout)
    check_seeds(layout.seeds, layout.seeds_at, query.device)
    return run_backward_joined(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule, kernels)


def _fake(
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
) -> Tensor:
    _check_rows(query, key)
    return query.new_empty((query.shape[0], _width(query, key, value)))


LIBRARY.impl("varlen_attn_backward_joined", _backward, "CompositeExplicitAutograd")
LIBRARY.impl(
    "varlen_attn_backward_joined", without_double_backward(varlen_attn_backward_joined, _backward), "Autograd", with_keyset=True
)
torch.library.register_fake("varlen_inductor::varlen_attn_backward_joined", _fake, lib=LIBRARY)
