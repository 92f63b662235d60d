"""AOTInductor's code runs without our Python, and is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

import varlen_inductor
from attention_cases import LENGTHS, WINDOWS, assert_close, make_case, reference
from helpers import MaskedAttention, padded_batch, run_python
from varlen_inductor import report
from varlen_inductor.lowering import ahead
from varlen_inductor.ops import packing
from varlen_inductor.ops.attention import split_arguments
from varlen_inductor.ops.problem import Problem

DATA: dict[str, dict[str, Any]] = {
    "plain": {},
    "used keys": {"seqused_k": torch.tensor([3, 0, 9], dtype=torch.int32)},
    "softcap": {"softcap": 2.0},
    "positions": {"position_q": torch.arange(24).flip(0), "position_k": torch.arange(24) * 2},
}


def check(case: Any) -> None:
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    layout, rule, _ = split_arguments(operands[0], *operands[3:], **case.options)
    out, lse, rng_state = ahead.attention(*operands[:3], layout, rule)
    expected_out, expected_lse = reference(case)
    assert_close(out, expected_out, case.query.dtype, "out")
    assert_close(lse, expected_lse, case.query.dtype, "lse")
    assert out.is_contiguous() and lse.is_contiguous()
    assert out.dtype == case.query.dtype and rng_state.shape == (0,)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention(lengths: tuple[Any, Any], window: tuple[int, int]) -> None:
    check(make_case(*lengths, heads=(4, 2), dims=(8, 4), window=window, tail=3, fill=float("nan")))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_attention_with_data(data: dict[str, Any], dtype: torch.dtype) -> None:
    check(make_case((5, 3, 16), window=(4, 0), dtype=dtype, **data))


@pytest.mark.parametrize("lengths", [[8, 3, 1], [0, 2, 0], [0, 0, 0], [8, 8, 8]])
def test_plan(lengths: list[int]) -> None:
    mask = torch.arange(8).flip(0) < torch.tensor(lengths)[:, None]
    for actual, expected in zip(ahead.plan_static(mask), packing.plan_static(mask)):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


class Model(MaskedAttention):
    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return super().forward(x, valid) * valid[..., None]


class Upstream(torch.nn.Module):
    def forward(self, x: Tensor, cu_seq: Tensor) -> Tensor:
        return varlen_attn(x.sin(), x, x, cu_seq, cu_seq, 11, 11, window_size=(3, 0)).cos()


def packaged(model: torch.nn.Module, inputs: tuple[Tensor, ...], path: Path) -> report.Report:
    """Export ``model`` with a first size that may change and compile it under our pass; what the pass said."""
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = tuple({0: batch} if isinstance(model, Model) else None for _ in inputs)
    with torch.no_grad(), report.collect() as reports:
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
        configs = {"pre_grad_custom_pass": varlen_inductor.VarlenPass()}
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    return reports[-1]


def run_elsewhere(path: Path, inputs: tuple[Tensor, ...]) -> Tensor:
    """What the package computes in a process that does not know this one's modules."""
    torch.save(inputs, path.with_suffix(".in"))
    run_python(
        f"""
        import sys, torch
        inputs = torch.load({str(path.with_suffix(".in"))!r})
        out = torch._inductor.aoti_load_package({str(path)!r})(*inputs)
        assert "varlen_inductor" not in sys.modules
        torch.save(out, {str(path.with_suffix(".out"))!r})
        """,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    return torch.load(path.with_suffix(".out"))


@pytest.mark.thorough
def test_on_the_cpu_padded_attention_stays(tmp_path: Path) -> None:
    model, inputs = Model().eval(), padded_batch()
    (site,) = packaged(model, inputs, tmp_path / "model.pt2").sites
    assert (site.decision, site.reason) == ("kept", "AOTInductor's code can only call aten_flash: it runs on CUDA only")
    assert torch.allclose(run_elsewhere(tmp_path / "model.pt2", inputs), model(*inputs), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_a_padded_model(prefix: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, but that the attention itself is written out in the end."""
    monkeypatch.setattr(ahead, "refusal", lambda problem, kernels: None)

    class Lengths(Model):
        def forward(self, x: Tensor, valid: Tensor) -> Tensor:
            return super().forward(x, torch.arange(x.shape[1]) < valid.sum(1, keepdim=True))

    model, inputs = (Lengths() if prefix else Model()).eval(), padded_batch()
    (site,) = packaged(model, inputs, tmp_path / "model.pt2").sites
    assert (site.decision, site.kernel) == ("rewritten", "aten_flash")
    inputs = padded_batch(batch=5)
    assert torch.allclose(run_elsewhere(tmp_path / "model.pt2", inputs), model(*inputs), atol=1e-5)
    names = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2")).get_constant_fqns()
    assert {"project.weight", "out.bias"} <= set(names)


@pytest.mark.slow
def test_varlen_attention_of_pytorch(tmp_path: Path) -> None:
    x, cu_seq = torch.randn(16, 2, 8), torch.tensor([0, 5, 5, 16], dtype=torch.int32)
    (site,) = packaged(Upstream(), (x, cu_seq), tmp_path / "model.pt2").sites
    assert (site.decision, site.kernel) == ("rewritten", "ATen operators")
    other = torch.tensor([0, 3, 9, 15], dtype=torch.int32)
    expected = torch.ops.varlen_inductor.varlen_attn(x.sin(), x, x, other, other, 11, 11, window_left=3, window_right=0)[0].cos()
    assert torch.allclose(run_elsewhere(tmp_path / "model.pt2", (x, other)), expected, atol=1e-5)


def test_the_only_kernel_may_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.aten_flash, "supports", lambda problem: None)
    problem = Problem(torch.device("cuda"), torch.bfloat16, 4, 4, 64, 64)
    for kernels in ("auto", "-triton", "aten_flash", "triton,aten_flash"):
        assert ahead.refusal(problem, kernels) is None
    for kernels in ("triton", "-aten_flash"):
        assert f"config.kernels is {kernels!r}" in (ahead.refusal(problem, kernels) or "")
    assert "equal" in (ahead.refusal(problem._replace(head_dim_v=32), "auto") or "")
