"""On CUDA: code of AOTInductor without Python, autotuning of real kernels, PyTorch's own varlen_attn under our flag."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

import varlen_inductor
from helpers import MaskedAttention, run_python
from varlen_inductor import _compat, report
from varlen_inductor.backend import varlen_inductor as backend

B, S, E = 8, 512, 512


class Model(MaskedAttention):
    """Where ``prefix``, valid positions are known to come first; the zero form's padded rows are masked by the model itself."""

    def __init__(self, prefix: bool) -> None:
        super().__init__(E, 8)
        self.prefix = prefix

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        keep = torch.arange(x.shape[1], device=x.device) < valid.sum(1, keepdim=True) if self.prefix else valid
        return super().forward(x, keep) * keep[..., None]


def inputs(requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([S, 300, 17, 1, 200, 512, 77, 129], device="cuda")
    x = torch.randn(B, S, E, device="cuda", dtype=torch.bfloat16, requires_grad=requires_grad)
    return x, torch.arange(S, device="cuda") < lengths[:, None]


@pytest.fixture(scope="module")
def packages_load(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where a package of PyTorch's own, which no pass of ours has seen, does not survive being loaded and run."""
    path = tmp_path_factory.mktemp("plain") / "model.pt2"
    model, x = torch.nn.Linear(64, 64).cuda(), torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=str(path))
    try:
        run_python(
            f"""
            import torch
            model = torch._inductor.aoti_load_package({str(path)!r})
            print(model(torch.randn(4, 64, device="cuda")).sum().item())
            """,
            TORCH_DEVICE_BACKEND_AUTOLOAD="0",
        )
    except AssertionError as error:
        pytest.skip(f"AOTInductor's package of a single nn.Linear does not run on this machine: {error}"[:300])


@pytest.mark.usefixtures("packages_load")
@pytest.mark.xdist_group("ahead of time")
@pytest.mark.parametrize("prefix", [False, True])
def test_ahead_of_time(prefix: bool, tmp_path: Path) -> None:
    """Loaded by a process without this package; another batch size than it was exported with, too."""
    model, (x, valid) = Model(prefix).cuda().bfloat16().eval(), inputs()
    path, batch = tmp_path / "model.pt2", torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad(), report.collect() as reports:
        program = torch.export.export(model, (x, valid), dynamic_shapes=({0: batch}, {0: batch}))
        passes = {"pre_grad_custom_pass": varlen_inductor.VarlenPass()}
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=passes)
        expected = model(x, valid)
    assert [(site.decision, site.kernel) for site in reports[-1].sites] == [("rewritten", "aten_flash")]
    torch.save((x, valid, expected), tmp_path / "data")
    run_python(
        f"""
        import sys, torch
        x, valid, expected = torch.load({str(tmp_path / "data")!r})
        model = torch._inductor.aoti_load_package({str(path)!r})
        for rows in (8, 5):
            out = model(x[:rows].clone(), valid[:rows].clone())
            assert (out - expected[:rows])[valid[:rows]].abs().max() < 0.03
            print("ran", rows, file=sys.stderr, flush=True)
        assert "varlen_inductor" not in sys.modules
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            model(x, valid)
            torch.cuda.synchronize()
        assert any("flash_fwd" in event.key for event in profile.key_averages())
        print("profiled", file=sys.stderr, flush=True)
        """,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
        PYTHONFAULTHANDLER="1",
    )


def test_kernels_are_timed() -> None:
    model, (x, valid) = Model(False).cuda().bfloat16(), inputs(requires_grad=True)
    compiled = torch.compile(model, backend=backend, mode="max-autotune-no-cudagraphs")
    with torch._inductor.config.patch(autotune_local_cache=False):  # no times of an earlier process
        out = compiled(x, valid)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    expected = model(x, valid)
    (wanted,) = torch.autograd.grad(expected.float().square().sum(), x)
    assert (out - expected).abs().max() < 0.03
    assert (gradient - wanted)[valid].abs().max() < 0.05 * wanted.abs().max()
    assert _compat.counters()["autotuned"] == 2


def test_varlen_attn_of_pytorch() -> None:
    ends = torch.tensor([0, 1000, 1000, 2500, 4096], dtype=torch.int32, device="cuda")
    operands = [torch.randn(4096, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        aux = AuxRequest(lse=True)
        out, lse = varlen_attn(q.sin(), k, v, ends, ends, 1600, 1600, window_size=(-1, 0), return_aux=aux)  # type: ignore[misc]
        return out.cos(), lse

    with report.collect() as reports:
        out, lse = torch.compile(attend, backend=backend)(*operands)
    assert [site.decision for site in reports[-1].sites] == ["rewritten"]
    expected, expected_lse = attend(*operands)
    assert (out - expected).abs().max() < 0.03
    assert (lse - expected_lse).abs().max() < 0.01
    wanted = torch.autograd.grad(expected.float().sum(), operands)
    for ours, theirs in zip(torch.autograd.grad(out.float().sum(), operands), wanted, strict=True):
        assert (ours - theirs).abs().max() < 0.1
