"""A kernel that raises: the next one takes its place, with a warning, unless that could hide something."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import varlen_inductor
from varlen_inductor import config
from varlen_inductor.ops import backends
from varlen_inductor.ops.backends import cpu, fallback, math
from varlen_inductor.ops.problem import Problem


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    fallback.forget()
    backends.choose.cache_clear()
    yield
    fallback.forget()
    backends.choose.cache_clear()


def call(**options: Any) -> tuple[Tensor, Tensor]:
    """The result and the gradient of query."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, 2, 8) for _ in range(3))
    q.requires_grad_()
    cu_seq = torch.tensor([0, 4, 9], dtype=torch.int32)
    out = varlen_inductor.varlen_attn(q, k, v, cu_seq, cu_seq, 5, 5, **options)
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out.square().sum(), q)
    return out.detach(), grad


def breaking(monkeypatch: pytest.MonkeyPatch, error: Exception, part: str = "forward") -> list[None]:
    """Replace the CPU's kernel by one that raises; returns the list of its calls."""
    calls: list[None] = []

    def raises(*args: Any) -> Any:
        calls.append(None)
        raise error

    broken = replace(cpu.BACKEND, **{part: raises})
    monkeypatch.setattr(backends, "BACKENDS", (broken, math.BACKEND))
    backends.choose.cache_clear()
    return calls


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_the_next_kernel_runs_it_from_then_on(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    expected = call()
    calls = breaking(monkeypatch, RuntimeError("driver too old"), part)
    with pytest.warns(RuntimeWarning, match="kernel cpu raised RuntimeError: driver too old. math runs this attention from now on"):
        found = call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = call()
    assert len(calls) == 1
    for results in (found, again):
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: an illegal memory access")])
def test_what_no_other_kernel_could_help_is_raised(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    breaking(monkeypatch, error)
    with pytest.raises(type(error), match=str(error)):
        call()


def test_with_dropout_it_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        call(dropout_p=0.5)


def test_without_another_kernel_it_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, RuntimeError("broken"))
    with config.patch(kernels="cpu"), pytest.raises(RuntimeError, match="broken"):
        call()


def test_strict_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, RuntimeError("broken"))
    with config.patch(strict=True), pytest.raises(RuntimeError, match="broken"):
        call()


def test_while_a_graph_is_recorded_nothing_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails to be recorded may be well: the error is the user's to see."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    problem = Problem(torch.device("cuda", 0), torch.bfloat16, 4, 4, 64, 64)
    with pytest.raises(ValueError, match="not while recording"):
        fallback.note(ValueError("not while recording"), backends.BACKENDS[0], problem, "auto", False)
    assert not fallback.failed(problem, False)
