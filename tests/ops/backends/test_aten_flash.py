"""What is put around PyTorch's CUDA kernels, on the CPU: a stand-in with the kernels' interface and limits takes their place.

The kernels themselves are tested in tests/gpu.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import LENGTHS, WINDOWS, assert_close, check_against_reference, make_case, reference, run
from varlen_inductor.ops import backends
from varlen_inductor.ops.backends import aten_flash
from varlen_inductor.ops.backends import math as exact
from varlen_inductor.ops.problem import Layout, Problem, Rule


def limits(layout: Layout, *operands: Tensor) -> None:
    dims = {x.shape[2] for x in operands}
    assert len(dims) == 1
    assert dims.pop() % 8 == 0
    for x in operands:
        assert x.stride(2) == 1
        assert x.stride(0) % 8 == x.stride(1) % 8 == 0
    assert layout.cu_seq_q.is_contiguous()
    assert layout.cu_seq_k.is_contiguous()


def rule_of(layout: Layout, dropout_p: float, causal: bool, scale: float, left: int, right: int) -> Rule:
    assert causal == ((left, right) == (-1, 0))
    return Rule(scale, -1 if left >= layout.max_k else left, -1 if right >= layout.max_k else right, dropout_p)


def stand_in(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, p: float, causal: bool,
    _: bool, *, scale: float, window_size_left: int, window_size_right: int, seqused_k: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Forward: rows behind the last sequence uninitialised, lse +inf without keys."""
    layout = Layout(cu_q, cu_k, max_q, max_k, seqused_k)
    limits(layout, query, key, value)
    assert max_q > 1 or query.shape[1] == key.shape[1]
    rule = rule_of(layout, p, causal, scale, window_size_left, window_size_right)
    out, lse, rng_state = exact.forward(query, key, value, layout, rule)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    out[int(cu_q[-1]) :] = lse[:, int(cu_q[-1]) :] = math.nan
    return out, lse, rng_state, None, None


def stand_in_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, p: float, causal: bool, rng_state: Tensor, _: Any, *, scale: float, window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Backward: what no sequence, and no block below ``max_k``, covers is uninitialised."""
    layout = Layout(cu_q, cu_k, max_q, max_k)
    limits(layout, grad_out, query, key, value, out)
    rule = rule_of(layout, p, causal, scale, window_size_left, window_size_right)
    delta = (out * grad_out).sum(-1)[: int(cu_q[-1])]
    assert delta.isfinite().all()
    grads = exact.backward(grad_out, None, out, lse, rng_state, query, key, value, layout, rule)
    grads[0][int(cu_q[-1]) :] = math.nan
    for grad in grads[1:]:
        grad[int(cu_k[-1]) :] = math.nan
        for start, stop in zip(cu_k[:-1].tolist(), cu_k[1:].tolist()):
            grad[start + max_k : max(stop, start + max_k)] = math.nan
    return grads


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(aten_flash, "_flash", stand_in)
    monkeypatch.setattr(aten_flash, "_flash_backward", stand_in_backward)
    monkeypatch.setattr(backends, "BACKENDS", (dataclasses.replace(aten_flash.BACKEND, supports=lambda problem: None),))
    backends.choose.cache_clear()
    yield
    backends.choose.cache_clear()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_and_windows(lengths: str, window: str) -> None:
    case = make_case(*LENGTHS[lengths], heads=(4, 2), window=WINDOWS[window], dtype=torch.float64, tail=3)
    check_against_reference(case)


@pytest.mark.parametrize("dims", [(8, 8), (5, 5), (16, 9), (3, 24)], ids=str)
def test_head_dims_are_padded(dims: tuple[int, int]) -> None:
    check_against_reference(make_case((5, 7), window=(-1, 0), dims=dims, dtype=torch.float64))


def test_gradient_through_lse_is_exact() -> None:
    """The second call gives exactly what lse adds, with and without dropout of the weights."""
    case = make_case((4, 3), (6, 3), window=(-1, 0), heads=(4, 2), dtype=torch.float64)

    def function(*operands: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return torch.ops.varlen_inductor.varlen_attn(*operands, *case.operands[3:], **case.options)[:2]

    assert torch.autograd.gradcheck(function, case.operands[:3])
    case.options["dropout_p"] = 0.4
    assert torch.autograd.gradcheck(function, case.operands[:3])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_used_keys(dropout_p: float) -> None:
    """The backward of the kernels knows no used keys."""
    used = torch.tensor([2, 0, 5], dtype=torch.int32)
    case = make_case((3, 2, 4), (6, 3, 9), dtype=torch.float64, seqused_k=used, dropout_p=dropout_p)._replace(max_k=5)
    out, lse, _ = run(case)
    options = {k: v for k, v in case.options.items() if k != "dropout_p"}
    expected, expected_lse = reference(case._replace(options=options))
    assert_close(lse, expected_lse, torch.float64, "lse")
    g = torch.randn_like(out)
    grads = torch.autograd.grad(out, case.operands[:3], g)
    assert torch.allclose((out * g).sum(), (case.value * grads[2]).sum()), "other weights were dropped"
    for grad in grads[1:]:
        assert (grad[2:9] == 0).all()
        assert (grad[14:] == 0).all()
    if dropout_p == 0.0:
        assert_close(out, expected, torch.float64, "out")
        for actual, wanted in zip(grads, torch.autograd.grad(expected, case.operands[:3], g)):
            assert_close(actual, wanted, torch.float64, "gradient")


def test_arguments_as_the_kernels_want_them() -> None:
    case = make_case((1, 1), (3, 4), heads=(4, 2), dtype=torch.float64)
    check_against_reference(case._replace(max_q=1))
    check_against_reference(make_case((9, 2), (3, 2), window=(-1, 3), dtype=torch.float64)._replace(max_k=3))
    strided = make_case((5, 7), dtype=torch.float64)
    offsets = torch.stack([strided.cu_seq_q, strided.cu_seq_q], 1)[:, 0]
    operands = [torch.stack([x.detach(), x.detach()], -1)[..., 0].requires_grad_() for x in strided.operands[:3]]
    check_against_reference(strided._replace(query=operands[0], key=operands[1], value=operands[2], cu_seq_q=offsets))


def test_too_many_sequences() -> None:
    offsets = torch.zeros(65537, dtype=torch.int32)
    rows = torch.zeros(1, 1, 8)
    with pytest.raises(RuntimeError, match="65536 sequences; the kernels take 65535"):
        torch.ops.varlen_inductor.varlen_attn(rows, rows, rows, offsets, offsets, 1, 1)


def test_reasons() -> None:
    problem = Problem(torch.device("cpu"), torch.bfloat16, 4, 4, 64, 64)
    assert aten_flash.supports(problem) == "it runs on CUDA only"
