"""Under max_autotune the kernels are timed and the order stands in the code; otherwise nothing is timed."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code

import varlen_inductor
from attention_cases import assert_close, make_case, reference
from helpers import MaskedAttention, padded_batch
from varlen_inductor import _compat, _compat_inductor
from varlen_inductor.lowering import autotune
from varlen_inductor.ops.backends import BACKENDS, cpu
from varlen_inductor.ops.problem import Layout, Rule

MODES = [{"mode": "max-autotune"}, {"options": {"max_autotune": True}}]


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    with fresh_cache():
        autotune.forget()
        _compat.counters().clear()
        torch._dynamo.reset()
        yield
    autotune.forget()


def attend(query: Tensor, key: Tensor, value: Tensor, cu_seq: Tensor, dropout_p: float = 0.0) -> Tensor:
    options = {"window_right": 0, "dropout_p": dropout_p}
    return torch.ops.varlen_inductor.varlen_attn(query * 2, key, value, cu_seq, cu_seq, 16, 16, **options)[0].cos()


def kernels(code: list[str]) -> list[str]:
    return re.findall(r"varlen_site\(.*kernels='([^']*)'\)", "\n".join(code))


def step(compiled: Any, operands: Any, *args: Any) -> tuple[list[Tensor], list[str]]:
    def run() -> list[Tensor]:
        out = compiled(*operands[:4], *args)
        return [out, *torch.autograd.grad(out.sum(), operands[:3])]

    return run_and_get_code(run)


@pytest.mark.parametrize("setting", MODES)
def test_candidates_are_timed_and_the_order_stands_in_the_code(setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    times = itertools.count(start=10, step=-1)  # each is faster than the one before: math before cpu
    monkeypatch.setattr(_compat_inductor, "benchmark", lambda run, device: (ran.append(run()), next(times))[1])
    case = make_case((5, 9))
    (out, *grads), code = step(torch.compile(attend, fullgraph=True, **setting), case.operands)
    assert kernels(code) == ["math,cpu", "math,cpu"]
    assert len(ran) == 4  # two kernels, forward and backward
    assert all(isinstance(x, Tensor) and not _compat.is_fake(x) for results in ran for x in results)
    assert _compat.counters()["autotuned"] == 2
    expected = reference(case._replace(query=case.query * 2, options={"window_left": -1, "window_right": 0}))[0].cos()
    assert_close(out, expected, torch.float32, "out")
    for actual, wanted in zip(grads, torch.autograd.grad(expected.sum(), case.operands[:3])):
        assert_close(actual, wanted, torch.float32, "gradient")


def test_nothing_is_timed_without() -> None:
    _, code = step(torch.compile(attend, fullgraph=True), make_case((5, 9)).operands)
    assert kernels(code) == ["auto", "auto"]
    assert "autotuned" not in _compat.counters()


def test_times_are_kept() -> None:
    operands = make_case((5, 9)).operands
    setting = {"options": {"max_autotune": True}}
    _, first = step(torch.compile(attend, **setting), operands)
    torch._dynamo.reset()
    autotune.forget()  # as in another process
    other = torch.compile(lambda *args: attend(*args).exp(), **setting)
    _, second = step(other, operands)
    assert kernels(first) == kernels(second)
    assert _compat.counters()["autotuned"] == 2
    assert len(list(Path(_compat_inductor.autotune_cache_folder() or "", "varlen_inductor").iterdir())) == 2
    with torch._inductor.config.patch(force_disable_caches=True):
        assert _compat_inductor.autotune_cache_folder() is None


@pytest.mark.parametrize("fast", ["cpu", "math"])
def test_with_dropout_one_kernel_runs_both(fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 2.0] if fast == "cpu" else [2.0, 1.0])
    monkeypatch.setattr(_compat_inductor, "benchmark", lambda run, device: (run(), next(times))[1])
    operands = make_case((5, 9)).operands
    (_, query_grad, *_), code = step(torch.compile(attend, options={"max_autotune": True}), operands, 0.5)
    assert [names.split(",")[0] for names in kernels(code)] == [fast, fast]
    assert query_grad.isfinite().all()


def test_config_kernels_limits_the_candidates() -> None:
    operands = make_case((5, 9)).operands
    with varlen_inductor.config.patch(kernels="-cpu"):
        _, code = step(torch.compile(attend, options={"max_autotune": True}), operands)
    assert kernels(code) == ["-cpu", "-cpu"]
    assert "autotuned" not in _compat.counters()


def test_a_candidate_that_raises_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Any, device: torch.device) -> float:
        if "cpu.py" in run.__closure__[0].cell_contents.forward.__code__.co_filename:
            raise RuntimeError("no luck")
        return 1.0

    monkeypatch.setattr(_compat_inductor, "benchmark", fails)
    _, code = step(torch.compile(attend, options={"max_autotune": True}), make_case((5, 9)).operands)
    assert kernels(code) == ["math", "math"]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_who_takes_seeds_is_timed_with_them(dropout_p: float) -> None:
    """As in a graph, where it need not draw them; its backward has them, too."""
    given: list[Any] = []

    def forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
        assert layout.seeds_at == 0
        given.append(layout.seeds)
        return query, query, torch.empty(0, dtype=torch.uint64)

    def backward(grad_out: Tensor, grad_lse: Any, out: Tensor, lse: Tensor, rng_state: Tensor, *rest: Any) -> None:
        given.append(rng_state)

    x, ends = torch.zeros(4, 1, 8), torch.tensor([0, 4], dtype=torch.int32)
    for takes_seeds in (False, True):
        backend = dataclasses.replace(cpu.BACKEND, forward=forward, backward=backward, takes_seeds=takes_seeds)
        given.clear()
        autotune._runner(backend, (x, x, x), Layout(ends, ends, 4, 4, seeds_at=4), Rule(1.0, dropout_p=dropout_p), "both", x)()
        first, second, numbers = given
        if takes_seeds and dropout_p:
            assert first is second is numbers
            assert numbers.dtype == torch.int64
        else:
            assert first is second is None
            assert numbers.dtype == torch.uint64


def test_random_numbers_are_those_without_timing() -> None:
    operands = [x.detach() for x in make_case((5, 9)).operands[:4]]
    drawn = []
    for options in ({"max_autotune": True}, {}):
        torch._dynamo.reset()
        torch.manual_seed(0)
        torch.compile(attend, options=options)(*operands)
        drawn.append(torch.rand(3))
    assert _compat.counters()["autotuned"] == 1
    assert torch.equal(*drawn)


def test_sizes_that_change() -> None:
    compiled = torch.compile(attend, fullgraph=True, options={"max_autotune": True}, dynamic=True)
    for lengths in ((5, 9), (3, 8, 1)):
        case = make_case(lengths)
        expected = reference(case._replace(query=case.query * 2, options={"window_left": -1, "window_right": 0}))[0].cos()
        assert_close(compiled(*case.operands[:4]), expected, torch.float32, "out")
    assert _compat.counters()["autotuned"] == 2


@pytest.mark.parametrize("packing", ["model", "attention"])
def test_a_padded_model(packing: str) -> None:
    model, (x, valid) = MaskedAttention(), padded_batch()
    options = {"varlen.packing": packing, "varlen.round_tokens": 4, "max_autotune": True}
    compiled = torch.compile(model, backend="varlen_inductor", options=options)
    out = compiled(x, valid)
    assert torch.allclose(out[valid], model(x, valid)[valid], atol=1e-5)
    assert _compat.counters()["autotuned"] >= 1


@pytest.mark.parametrize(
    ("tokens", "sequences", "longest"), [(100, 7, 40), (16, 4, 4), (99, 4, 8), (0, 3, 5), (10, 1, 16), (5, 0, 5)]
)
def test_lengths(tokens: int, sequences: int, longest: int) -> None:
    found = autotune.lengths(tokens, sequences, longest)
    assert len(found) == sequences
    assert all(0 <= length <= longest for length in found)
    assert sum(found) == min(tokens, sequences * longest)


def test_every_layout_has_operands() -> None:
    """Used keys, positions, two layouts, more rows than sequences: what is timed can be run."""
    case = make_case((5, 9), (7, 3), tail=3, fill=0.0)
    data = {
        "seqused_k": torch.tensor([3, 2], dtype=torch.int32),
        "position_q": torch.arange(17),
        "position_k": torch.arange(13),
    }

    def function(*operands: Any) -> Tensor:
        return torch.ops.varlen_inductor.varlen_attn(*operands[:5], 9, 7, window_right=0, **data)[0]

    operands = [x.detach() for x in case.operands[:5]]
    out = torch.compile(function, options={"max_autotune": True})(*operands)
    assert torch.allclose(out, function(*operands), atol=1e-5)
    (times,) = autotune._answers.values()
    assert set(times) == {backend.name for backend in BACKENDS if backend.name in ("cpu", "math")}
