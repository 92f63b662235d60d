"""`varlen_attn_out`: the same into a tensor that is there."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn.attention import varlen as upstream

from attention_cases import make_case
from varlen_inductor import AuxRequest, varlen_attn, varlen_attn_out


def test_takes_what_upstream_takes() -> None:
    if not hasattr(upstream, "varlen_attn_out"):
        pytest.skip("this PyTorch has none")
    ours = inspect.signature(varlen_attn_out).parameters
    for name, parameter in inspect.signature(upstream.varlen_attn_out).parameters.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


@pytest.mark.parametrize("compiled", [False, True])
def test_writes_what_varlen_attn_returns(compiled: bool) -> None:
    case = make_case((5, 0, 3), dims=(8, 4))
    function = torch.compile(varlen_attn_out, backend="aot_eager", fullgraph=True) if compiled else varlen_attn_out
    expected, expected_lse = varlen_attn(*case.operands, window_size=(-1, 0), return_aux=AuxRequest(lse=True))
    out = torch.full((2, 8, 4), torch.nan).transpose(0, 1)  # any strides
    with torch.no_grad():
        assert function(out, *case.operands, window_size=(-1, 0)) is out
        assert torch.equal(out, expected)
        out.fill_(torch.nan)
        again, lse = function(out, *case.operands, window_size=(-1, 0), return_aux=AuxRequest(lse=True))
    assert again is out
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_has_no_gradient() -> None:
    case = make_case((5, 3))
    case.query.requires_grad_()
    with pytest.raises(RuntimeError, match="varlen_attn_out has no gradient: call varlen_attn"):
        varlen_attn_out(torch.empty_like(case.query), *case.operands)


@pytest.mark.parametrize(
    "out",
    [torch.empty(8, 2, 7), torch.empty(7, 2, 8), torch.empty(8, 2, 8, dtype=torch.float64), torch.empty(8, 2, 8, device="meta")],
)
def test_says_what_does_not_fit(out: torch.Tensor) -> None:
    case = make_case((5, 3))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"out is .*; it must be torch.float32 of shape \(8, 2, 8\)"),
    ):
        varlen_attn_out(out, *case.operands)
