"""Grad mode, autocast, writes and hooks around and between the operations that are packed: each holds for what it held for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from soundness.harness import (
    FORMS,
    HEADS,
    WIDTH,
    Program,
    assert_packed,
    both_ways,
    check,
    direct_backend,
    hidden,
    keys,
    mask_of,
    quick,
    watched_runs,
)
from varlen_inductor.backend import varlen_inductor

RIGHT = mask_of("right")
Operation = Callable[..., Tensor]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=keys(valid)).transpose(1, 2).flatten(2)


def projected(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three projections of their own, as BERT has them."""
    return m.linear(x), m.b.out(x), m.a.out(x)


# --- grad mode -------------------------------------------------------------------------------------------------------


def _projections_without(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    with torch.no_grad():
        q, k, v = projected(m, x)
    return m.head(x + attention(q, k, v, valid))


def _one_projection_without(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    q = m.linear(x)
    with torch.no_grad():
        k = m.b.out(x)
    return m.head(attention(q, k, m.a.out(x), valid))


def _attention_without(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    q, k, v = projected(m, x)
    with torch.no_grad():
        y = attention(q, k, v, valid)
    return m.head(x + y)


def _layer_without(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.a(x, keys(valid))
    return m.b(y + x, keys(valid))


def _allowed_within(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.a(x, keys(valid))
        with torch.enable_grad():
            y = y + m.linear(x)
        z = m.norm(y)
    return m.b(y, keys(valid)) + z


def _detached(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    q, k, v = projected(m, x)
    return m.b(attention(q, k.detach(), v, valid).detach() + m.linear(x), keys(valid))


GRAD_MODES: dict[str, Operation] = {
    "projections without": _projections_without,
    "one projection without": _one_projection_without,
    "attention without": _attention_without,
    "a layer without": _layer_without,
    "allowed within": _allowed_within,
    "detached": _detached,
}


@both_ways
@pytest.mark.parametrize("name", GRAD_MODES)
def test_grad_modes(name: str, form: str, train: bool) -> None:
    body = GRAD_MODES[name]
    result = check(lambda m, x, v: body(m, x, v), (hidden(), RIGHT), RIGHT, packing=form, train=train)
    assert_packed(result, form)


# --- autocast --------------------------------------------------------------------------------------------------------


def half(enabled: bool = True) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def _projections_in_half(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    with half():
        q, k, v = projected(m, x)
    return m.head(x + attention(q.float(), k.float(), v.float(), valid))


def _one_projection_in_half(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    q = m.linear(x)
    with half():
        k = m.b.out(x)
    return m.head(attention(q, k.float(), m.a.out(x), valid))


def _attention_in_half(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    q, k, v = projected(m, x)
    with half():
        y = attention(q, k, v, valid)
    return m.head(x + y)


def _all_but_the_head(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    with half():
        y = m.b(m.norm(m.a(x, keys(valid))), keys(valid))
        with half(False):
            return m.head(y.float())


AUTOCASTS: dict[str, Operation] = {
    "projections": _projections_in_half,
    "one projection": _one_projection_in_half,
    "attention": _attention_in_half,
    "all but the head": _all_but_the_head,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", AUTOCASTS)
def test_autocast_in_the_graph(name: str, form: str) -> None:
    """Results have eager's dtype, and its precision; whether this packs depends on the version of torch."""
    body = AUTOCASTS[name]
    check(lambda m, x, v: body(m, x, v), (hidden(), RIGHT), RIGHT, packing=form, dtype=torch.float32, tolerance=4e-2)


# --- writes to parameters --------------------------------------------------------------------------------------------


def _halved_between(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    q = m.linear(x)
    with torch.no_grad():
        m.linear.weight.mul_(0.5)
        m.linear.bias.add_(1)
    return attention(q, m.linear(x), m.a.out(x), valid)


def _halved_behind(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    q, k, v = projected(m, x)
    m.linear.weight.detach().mul_(0.5)
    return m.linear(attention(q, k, v, valid))


def _buffer_between(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    scale = torch.ones(WIDTH, dtype=x.dtype)
    q = m.linear(x) * scale
    scale.add_(1)
    return attention(q, m.b.out(x) * scale, m.a.out(x), valid)


WRITES: dict[str, Operation] = {
    "a weight, between two projections": _halved_between,
    "a weight, before its next use": _halved_behind,
    "a scale, between two projections": _buffer_between,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", WRITES)
def test_writes_between(name: str, form: str) -> None:
    """In inference: autograd refuses a weight that was written after its use."""
    body = WRITES[name]
    with torch.no_grad():
        check(lambda m, x, v: body(m, x, v), (hidden(grad=False), RIGHT), RIGHT, packing=form, train=False)


# --- hooks on what is saved for the backward -------------------------------------------------------------------------

HOOKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "copies": lambda: saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()),
    "numbers in memory elsewhere": save_on_cpu,
}


def _gradients(model: Any, compiled: Any, x: Tensor, hooks: AbstractContextManager[Any]) -> list[Tensor | None]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    with hooks:
        y = compiled(x, RIGHT)
    y[RIGHT].square().sum().backward()
    return [y[RIGHT].detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("backend", [direct_backend, varlen_inductor], ids=["as it is", "aot_eager"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_on_saved_tensors(name: str, form: str, backend: Any) -> None:
    """What hooks give back need not be the tensor that was saved. (A graph that is compiled under them is left alone.)"""

    def body(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        q, k, v = projected(m, x)
        return m.b(m.norm(attention(q, k, v, valid)), keys(valid))

    torch._dynamo.reset()
    model = Program(body).double()
    with quick(packing=form, inner_backend="aot_eager"), watched_runs() as runs:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for hooks in (nullcontext, HOOKS[name]):
            x = hidden()
            torch.testing.assert_close(_gradients(model, compiled, x, hooks()), _gradients(model, model, x, hooks()))
    assert runs["packed"] == (2 if form == "model" else 0)
