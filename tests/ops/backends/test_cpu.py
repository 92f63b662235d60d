"""The CPU backend: what goes through PyTorch's flash attention and what does not, with the same results."""

from __future__ import annotations

import pytest
import torch

from attention_cases import check_against_reference, make_case
from varlen_inductor.ops.backends import choose, cpu
from varlen_inductor.ops.problem import Layout, Problem, Rule


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """``is_causal`` of each call of PyTorch's kernel."""
    calls: list[bool] = []
    kernel = cpu._flash

    def count(*args: object, **kwargs: object) -> object:
        calls.append(args[4])  # type: ignore[arg-type]
        return kernel(*args, **kwargs)

    monkeypatch.setattr(cpu, "_flash", count)
    return calls


def test_one_call_for_neighbours_of_equal_length(flash_calls: list[bool]) -> None:
    check_against_reference(make_case((6, 6, 6, 9)), lse_gradient=False)
    assert flash_calls == [False, False]


def test_causal_square_sequences(flash_calls: list[bool]) -> None:
    check_against_reference(make_case((6, 1, 9), window=(-1, 0)), lse_gradient=False)
    assert flash_calls == [True, False, True]  # one query sees everything


def test_windows_that_hide_nothing(flash_calls: list[bool]) -> None:
    check_against_reference(make_case((6, 9), window=(8, 8)), lse_gradient=False)
    check_against_reference(make_case((1, 1), (6, 9), window=(-1, 0)), lse_gradient=False)
    assert flash_calls == [False] * 4


@pytest.mark.parametrize("changes", [{"window": (2, 0)}, {"dims": (8, 4)}, {"dropout_p": 0.5}], ids=str)
def test_what_the_kernel_does_not_know(flash_calls: list[bool], changes: dict[str, object]) -> None:
    case = make_case((6, 9), **changes)
    torch.ops.varlen_inductor.varlen_attn(*case.operands, **case.options)
    assert flash_calls == []


@pytest.mark.parametrize("length", [40, cpu.HALF_BACKWARD_KEYS + 10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_backward_on_both_sides_of_the_limit(dtype: torch.dtype, length: int) -> None:
    check_against_reference(make_case((length, 7), heads=(4, 2), dims=(16, 16), dtype=dtype), lse_gradient=False)


def test_choice() -> None:
    case = make_case((6, 9))
    problem = Problem.of(*case.operands[:3], Layout(*case.operands[3:]), Rule(1.0))
    choice = choose(problem)
    assert choice.backend.name == "cpu"
    assert choice.refused["aten_flash"] == "it runs on CUDA only"
    assert choice.refused["math"] == "cpu comes first"
    assert choose(problem, "math").backend.name == "math"
    with pytest.raises(RuntimeError, match=r"no kernel can run this attention \(.*triton: it runs on CUDA only"):
        choose(problem, "triton")


@pytest.mark.parametrize(
    ("kernels", "chosen"),
    [("auto", "cpu"), ("math,cpu", "math"), ("triton, math", "math"), ("-cpu", "math"), ("-triton,-aten_flash", "cpu")],
)
def test_choice_from_some(kernels: str, chosen: str) -> None:
    case = make_case((6, 9))
    choice = choose(Problem.of(*case.operands[:3], Layout(*case.operands[3:]), Rule(1.0)), kernels)
    assert choice.backend.name == chosen
    for name in {"aten_flash", "triton", "cpu", "math"} - {chosen}:
        assert choice.refused[name]
    if chosen == "math":
        assert choice.refused["cpu"] in (f"config.kernels is {kernels!r}", "math comes first")


@pytest.mark.parametrize("kernels", ["quickest", "-fastest", "cpu,-math", "", "cpu,", "auto,cpu"])
def test_kernels_that_there_are_not(kernels: str) -> None:
    case = make_case((6, 9))
    problem = Problem.of(*case.operands[:3], Layout(*case.operands[3:]), Rule(1.0))
    with pytest.raises(ValueError, match=r"config\.kernels is .*; it must be 'auto', .*; there are aten_flash, .*cpu"):
        choose(problem, kernels)
