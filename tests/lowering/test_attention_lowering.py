"""What Inductor makes of varlen_attn: one direct call each way, right numbers, with and without dynamic sizes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import varlen_inductor
import varlen_inductor.lowering
from attention_cases import assert_close, make_case, reference
from varlen_inductor.lowering import direct
from varlen_inductor.ops import attention


def attend(query: Tensor, key: Tensor, value: Tensor, cu_seq: Tensor) -> Tensor:
    return varlen_inductor.varlen_attn(query * 2, key, value, cu_seq, cu_seq, 16, 16, window_size=(-1, 0)).cos()


def calls(code: list[str]) -> list[str]:
    """The lines that assign from a call of ours, by function."""
    return re.findall(r"= (\S*varlen\w*(?:\.\w+)*)\(", "\n".join(code))


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_direct_call_each_way(dynamic: bool) -> None:
    case = make_case((5, 9), dims=(8, 4))
    compiled = torch.compile(attend, dynamic=dynamic, fullgraph=True)

    def step() -> tuple[Tensor, ...]:
        out = compiled(*case.operands[:4])
        return (out, *torch.autograd.grad(out.sum(), case.operands[:3]))

    (out, *grads), code = run_and_get_code(step)
    assert calls(code) == ["varlen_inductor_lowering_direct_forward", "varlen_inductor_lowering_direct_backward"]
    expected = reference(case._replace(query=case.query * 2, options={"window_left": -1, "window_right": 0}))[0].cos()
    assert_close(out, expected, torch.float32, "out")
    for actual, wanted in zip(grads, torch.autograd.grad(expected.sum(), case.operands[:3])):
        assert_close(actual, wanted, torch.float32, "gradient")


def test_direct_calls_take_what_the_operators_take() -> None:
    case = make_case((5, 9), window=(-1, 0))
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    results = direct.forward(*operands, **case.options)
    for actual, expected in zip(results, attention.varlen_attn(*operands, **case.options)):
        assert torch.equal(actual, expected)
    gradients = (torch.randn_like(results[0]), torch.randn_like(results[1]), *results)
    actual = direct.backward(*gradients, *operands, **case.options)
    for one, other in zip(actual, attention.varlen_attn_backward(*gradients, *operands, **case.options)):
        assert torch.equal(one, other)


def test_scale_of_zero_is_a_scale() -> None:
    case = make_case((5,))
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    out, _, _ = direct.forward(*operands, scale=0.0)
    assert torch.allclose(out, operands[2].mean(0, keepdim=True).expand_as(out), atol=1e-6)


def test_debug_checks_offsets_in_compiled_code() -> None:
    case = make_case((5, 9))
    operands = [x.detach() for x in case.operands[:4]]
    compiled = torch.compile(attend)
    compiled(*operands)
    operands[3] = torch.tensor([0, 5, 20], dtype=torch.int32)
    with varlen_inductor.config.patch(debug=True), pytest.raises(ValueError, match="cu_seq_q ends with 20"):
        compiled(*operands)


def test_in_a_branch() -> None:
    """Code of a subgraph is written by another writer than that of the graph."""

    def function(flag: Tensor, *operands: Tensor) -> Tensor:
        return torch.cond(flag, lambda *x: attend(*x), lambda *x: x[0].sin(), operands)

    case = make_case((5, 9))
    operands = [x.detach() for x in case.operands[:4]]
    compiled = torch.compile(function, fullgraph=True)
    for flag in (torch.tensor(True), torch.tensor(False)):
        assert torch.allclose(compiled(flag, *operands), function(flag, *operands), atol=1e-5)


@pytest.mark.slow
def test_in_cpp_wrapper_code() -> None:
    case = make_case((5, 9))
    operands = [x.detach() for x in case.operands[:4]]
    compiled = torch.compile(attend, options={"cpp_wrapper": True})
    assert torch.allclose(compiled(*operands), attend(*operands), atol=1e-5)
