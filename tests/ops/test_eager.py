"""Eager calls past the dispatcher: the same results as through it, and the dispatcher where somebody listens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import varlen_inductor
from attention_cases import Case, make_case
from varlen_inductor import AuxRequest
from varlen_inductor.ops import eager


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """The calls that went past the dispatcher."""
    calls: list[None] = []
    attend = eager.attend

    def watch(*args: Any) -> Any:
        calls.append(None)
        return attend(*args)

    monkeypatch.setattr(eager, "attend", watch)
    return calls


def call(case: Case, *operands: Tensor, **options: Any) -> Any:
    return varlen_inductor.varlen_attn(*(operands or case.operands[:3]), *case.operands[3:], window_size=(-1, 0), **options)


def test_meta_tensors_have_shapes_only(straight: list[None]) -> None:
    case = make_case((5, 9), dims=(8, 4))
    operands = [x.to("meta") if isinstance(x, Tensor) else x for x in case.operands]
    out = varlen_inductor.varlen_attn(*operands)
    assert out.is_meta and out.shape == (14, *case.value.shape[1:])
    assert not straight


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("want_lse", [False, True])
def test_both_ways_agree(straight: list[None], want_lse: bool, dropout_p: float) -> None:
    used = torch.tensor([4, 3], dtype=torch.int32)
    case = make_case((5, 3), seqused_k=used)
    options = {"return_aux": AuxRequest(want_lse), "seqused_k": used, "dropout_p": dropout_p, "scale": 0.3, "softcap": 2.0}

    def results() -> list[Tensor]:
        torch.manual_seed(0)
        outs = call(case, **options)
        outs = outs if want_lse else (outs,)
        return [*outs, *torch.autograd.grad([out.square().sum() for out in outs], case.operands[:3])]

    found = results()
    assert len(straight) == 1
    with torch.profiler.profile() as profile:
        expected = results()
    assert len(straight) == 1
    assert "varlen_inductor::varlen_attn" in {event.key for event in profile.key_averages()}
    assert all(map(torch.equal, found, expected))


def test_somebody_listens(straight: list[None]) -> None:
    case = make_case((5, 3))
    with FlopCounterMode(display=False) as flops:
        call(case)
    assert flops.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert call(case).dtype == torch.bfloat16
    torch.compile(call, backend="eager", fullgraph=True)(case)
    assert straight == []


def test_gradients_of_some_and_of_none(straight: list[None]) -> None:
    case = make_case((5, 3))
    q, k, v = (x.detach() for x in case.operands[:3])
    assert not call(case, q, k, v).requires_grad
    assert not call(case, q, k, v, return_aux=AuxRequest(True))[1].requires_grad
    wanted = torch.autograd.grad(call(case).sum(), case.key)[0]
    assert torch.equal(torch.autograd.grad(call(case, q, case.key, v).sum(), case.key)[0], wanted)
    _, lse = call(case, return_aux=AuxRequest(True))
    assert torch.equal(torch.autograd.grad(lse.sum(), case.value)[0], torch.zeros_like(v))
    assert len(straight) == 5


def test_second_derivative_is_refused(straight: list[None]) -> None:
    case = make_case((5,))
    (grad,) = torch.autograd.grad(call(case).sum(), case.query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), case.query)
    assert len(straight) == 1


def test_changes_before_the_backward_are_noticed(straight: list[None]) -> None:
    case = make_case((5, 3))
    for tensor in (case.cu_seq_q, case.value):
        out = call(case)
        with torch.no_grad():
            tensor.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    assert len(straight) == 2


def test_checkpoint_recomputed_by_the_other_way(straight: list[None]) -> None:
    case = make_case((5, 3))
    expected = torch.autograd.grad(call(case).sum(), case.query)
    out = checkpoint(call, case, use_reentrant=False)
    with torch.profiler.profile():
        found = torch.autograd.grad(out.sum(), case.query)
    assert torch.equal(found[0], expected[0])
    assert len(straight) == 2


def test_numbers_that_are_tensors() -> None:
    case = make_case((5, 3))
    expected = call(case, scale=0.5)
    operands = (*case.operands[:5], torch.tensor(5), torch.tensor(5))
    assert torch.equal(varlen_inductor.varlen_attn(*operands, window_size=(-1, 0), scale=torch.tensor(0.5)), expected)
