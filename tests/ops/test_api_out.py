"""`varlen_attn_out`: the same into a tensor that is there."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as upstream

from attention_cases import make_case
from paged_cases import in_pages
from varlen_inductor import AuxRequest, varlen_attn, varlen_attn_out
from varlen_inductor.ops import backends
from varlen_inductor.ops.backends import cpu, fallback, math


def test_takes_what_upstream_takes() -> None:
    if not hasattr(upstream, "varlen_attn_out"):
        pytest.skip("this PyTorch has none")
    ours = inspect.signature(varlen_attn_out).parameters
    for name, parameter in inspect.signature(upstream.varlen_attn_out).parameters.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


@pytest.mark.parametrize("compiled", ["", "aot_eager", "inductor"])
def test_writes_what_varlen_attn_returns(compiled: str) -> None:
    case = make_case((5, 0, 3), dims=(8, 4))
    function = torch.compile(varlen_attn_out, backend=compiled, fullgraph=True) if compiled else varlen_attn_out
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


def test_the_change_is_noticed() -> None:
    """By autograd, as for any tensor that is changed in place."""
    case = make_case((5, 3))
    out = torch.empty_like(case.query)
    with torch.no_grad():
        before = out._version
        varlen_attn_out(out, *case.operands)
        assert out._version > before
    with torch.inference_mode():
        varlen_attn_out(torch.empty_like(out), *case.operands)


def test_pages() -> None:
    plain = make_case((5, 0, 3), (6, 2, 9))
    case = in_pages(plain, 4)
    out = torch.empty_like(case.query)
    options = {"seqused_k": case.options["seqused_k"], "block_table": case.options["block_table"]}
    assert varlen_attn_out(out, *case.operands[:4], None, *case.operands[5:], num_splits=1, **options) is out
    assert torch.equal(out, varlen_attn(*case.operands[:4], None, *case.operands[5:], **options))


def test_a_kernel_writes_it_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it can, and if it does not raise; a strided last dim is copied to."""
    written = []

    def into(out: torch.Tensor, query: torch.Tensor, *args: Any) -> torch.Tensor:
        written.append(out)
        if query.shape[0] == 5:
            raise RuntimeError("broken")
        return torch.zeros(out.shape[1], out.shape[0])

    monkeypatch.setattr(backends, "BACKENDS", (dataclasses.replace(cpu.BACKEND, forward_into=into), math.BACKEND))
    backends.choose.cache_clear()
    case = make_case((5, 3))
    with torch.no_grad():
        out = torch.zeros_like(case.query)
        _, lse = varlen_attn_out(out, *case.operands, return_aux=AuxRequest(lse=True))
        assert written == [out]
        assert not out.any()
        assert not lse.any()
        strided = torch.zeros(8, 2, 16)[..., ::2]
        varlen_attn_out(strided, *case.operands)
        assert len(written) == 1
        assert torch.equal(strided, varlen_attn(*case.operands))
        case = make_case((5,))
        with pytest.warns(RuntimeWarning, match="the kernel cpu raised RuntimeError: broken. math runs"):
            varlen_attn_out(case.query.detach().clone(), *case.operands)
    fallback.forget()
    backends.choose.cache_clear()


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
