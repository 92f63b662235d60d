"""With dropout the backward runs the kernel that the forward was lowered to, also where it cannot be lowered itself."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch

from attention_cases import make_case
from varlen_inductor.lowering import attention, autotune
from varlen_inductor.ops import backends
from varlen_inductor.ops.backends import aten_flash, cpu, math
from varlen_inductor.ops.problem import Problem


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("kernels", ["auto", "cpu,math", "math"])
@pytest.mark.parametrize("fast", ["cpu", "math"])
def test_one_kernel_under_max_autotune(fast: str, kernels: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has the seeds, forward and backward ask the same question, and its answer is the kernel of both."""
    takers = tuple(dataclasses.replace(x, takes_seeds=True) for x in (cpu.BACKEND, math.BACKEND))
    monkeypatch.setattr(backends, "BACKENDS", takers)
    monkeypatch.setattr(autotune, "BACKENDS", takers)
    monkeypatch.setattr(backends, "_order", lambda problem, backward, host_counts: backends.BACKENDS)
    monkeypatch.setattr(attention, "_chosen", _as_if_on_cuda)
    backends.choose.cache_clear()

    def answer(question: Any, *args: Any) -> dict[str, float]:
        # What is timed twice comes out another way.
        slow = question.problem.seeded or question.part != "both"
        return {name: float((name == fast) == slow) for name in question.candidates}

    monkeypatch.setattr(autotune, "_answer", answer)
    named: dict[str, str] = {}

    def note(way: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            result = (attention._forward if way == "forward" else attention._backward)(*args, **options)
            if result is not NotImplemented:
                return result
            named[way] = options["kernels"]
            return out, lse, rng_state

        return types.SimpleNamespace(default=call)

    def drawn(*args: Any, **options: Any) -> Any:
        named["forward"] = options["kernels"]
        return out, lse

    case = make_case((5, 3))
    operands = [x.detach() if isinstance(x, torch.Tensor) else x for x in case.operands]
    out, lse, rng_state = torch.zeros(8, 2, 8), torch.zeros(2, 8), torch.zeros(2, dtype=torch.uint64)
    operators = {"varlen_attn": note("forward"), "varlen_attn_backward": note("backward")}
    operators["varlen_attn_drawn"] = types.SimpleNamespace(default=drawn)
    monkeypatch.setattr(attention, "_ops", types.SimpleNamespace(**operators))
    options: dict[str, Any] = {"dropout_p": 0.5, "kernels": kernels}
    with torch._inductor.config.patch(max_autotune=True):
        seeds = {"seeds": torch.tensor([3, 4])} if given else {}
        _, _, numbers = attention._ops.varlen_attn.default(*operands, **options, **seeds)
        numbers = seeds.get("seeds", numbers)
        assert numbers.dtype == torch.int64
        attention._ops.varlen_attn_backward.default(out, None, out, lse, numbers, *operands, **options)
    backends.choose.cache_clear()
    assert named == dict.fromkeys(("forward", "backward"), "math" if kernels == "math" else fast)


def _as_if_on_cuda(query: Any, key: Any, value: Any, layout: Any, rule: Any, kernels: str) -> Any:
    problem = Problem.of(query, key, value, layout, rule)
    return tuple(backends.choose(problem, kernels, backward).backend for backward in (False, True))


@pytest.mark.parametrize(("dropout_p", "expected"), [(0.1, "aten_flash"), (0.0, None)])
def test_gradient_of_lse(dropout_p: float, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ATen operator knows none, so ours is called: which then must not choose by what only the run knows."""
    called: list[Any] = []

    class Operators:
        class varlen_attn_backward:
            @staticmethod
            def default(*args: Any, **options: Any) -> str:
                called.append(options["kernels"])
                return "called"

    monkeypatch.setattr(attention, "_ops", Operators)
    monkeypatch.setattr(attention, "_direct", lambda *args, **options: True)
    monkeypatch.setattr(attention, "_chosen", lambda *args: (aten_flash.BACKEND,) * 2)
    case = make_case((5, 3))
    operands = [x.detach() if isinstance(x, torch.Tensor) else x for x in case.operands]
    out, lse = torch.zeros(8, 2, 8), torch.zeros(2, 8)
    given = (out, lse, out, lse, torch.zeros(2, dtype=torch.uint64), *operands)
    result = attention._backward(*given, dropout_p=dropout_p, kernels="auto")
    assert called == ([] if expected is None else [expected])
    assert result == ("called" if expected else NotImplemented)
    # Named already, it is left to the operator.
    assert attention._backward(*given, dropout_p=dropout_p, kernels="aten_flash") is NotImplemented
