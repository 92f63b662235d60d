"""The Triton kernels against the reference, in Triton's interpreter. On a GPU: tests/gpu."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attention_cases import LENGTHS, WINDOWS, assert_close, check_against_reference, make_case, reference, run
from triton_interpreter import interpret, needs_interpreter
from varlen_inductor.ops import backends
from varlen_inductor.ops.backends import triton_kernel
from varlen_inductor.ops.problem import Problem

pytestmark = needs_interpreter


def small_blocks_on_the_cpu() -> None:
    """Blocks so small that a short sequence has several of them."""
    small = triton_kernel.Blocks(16, 16, 4, 1)
    triton_kernel.OTHER.update(dict.fromkeys(triton_kernel.OTHER, triton_kernel.Tiles(small, small, small)))
    backends.BACKENDS = (dataclasses.replace(triton_kernel.BACKEND, supports=lambda problem: None),)
    backends.choose.cache_clear()
    torch.manual_seed(0)


def check_lengths() -> None:
    small_blocks_on_the_cpu()
    for name, lengths in LENGTHS.items():
        for window in ("full", "causal", "sliding"):
            print(name, window)
            check_against_reference(make_case(*lengths, heads=(2, 1), dims=(16, 16), window=WINDOWS[window], tail=3))


def check_windows() -> None:
    small_blocks_on_the_cpu()
    for window in ((-1, 0), (20, 3), (5, -1), (17, 0), (-1, 30), (0, 0), (100, 100)):
        for lengths in (((35, 5), (50, 40)), ((50, 40), (35, 5))):
            print(window, lengths)
            check_against_reference(make_case(*lengths, heads=(1, 1), dims=(16, 16), window=window))


def check_heads_and_dims() -> None:
    small_blocks_on_the_cpu()
    for heads in ((1, 1), (4, 2), (3, 1)):
        for dims in ((16, 16), (8, 24), (40, 20)):
            check_against_reference(make_case((20, 3), heads=heads, dims=dims, window=(-1, 0)))
    # Not bfloat16: the interpreter multiplies its bits as integers.
    check_against_reference(make_case((20, 3), heads=(4, 2), window=(-1, 0), dtype=torch.float16), lse_gradient=False)
    for scale in (-0.3, 0.0, 2.0):
        check_against_reference(make_case((20, 3), dims=(16, 16), window=(-1, 0), scale=scale))


def check_positions() -> None:
    small_blocks_on_the_cpu()
    positions = torch.cat([torch.randperm(60)[:40].sort().values, torch.randperm(30)])
    for window in ((-1, 0), (5, 3), (-1, -1)):
        check_against_reference(make_case((40, 30), window=window, position_q=positions, position_k=positions.int()))


def check_strides() -> None:
    """The padded layout: rows of a batch (B, S, 3, H, D) with its unused keys, heads first, a strided last dim."""
    small_blocks_on_the_cpu()
    used = torch.tensor([5, 20, 0], dtype=torch.int32)
    plain = make_case((20, 20, 20), heads=(2, 2), dims=(16, 16), window=(-1, 0), seqused_k=used)
    expected, _ = reference(plain)
    qkv = torch.stack([x.detach() for x in plain.operands[:3]], 1)
    for start, stop in ((5, 20), (40, 60)):
        qkv[start:stop, 1:] = float("nan")
    qkv.requires_grad_()
    layouts = {
        "fused": qkv.unbind(1),
        "heads first": [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv.unbind(1)],
        "strided": [torch.stack([x, x], -1)[..., 0] for x in qkv.unbind(1)],
    }
    g = torch.randn(2, 60, 16).transpose(0, 1)
    wanted = torch.autograd.grad(expected, plain.operands[:3], g.double())
    for name, operands in layouts.items():
        out, _, _ = torch.ops.varlen_inductor.varlen_attn(*operands, *plain.operands[3:], **plain.options)
        assert_close(out, expected, torch.float32, name)
        (grad,) = torch.autograd.grad(out, qkv, g, retain_graph=True)
        for actual, expected_grad in zip(grad.unbind(1), wanted):
            assert_close(actual, expected_grad, torch.float32, name)


def check_dropout() -> None:
    small_blocks_on_the_cpu()
    case = make_case((20, 7), heads=(4, 2), window=(-1, 0), dropout_p=0.4)
    torch.manual_seed(1)
    out, lse, rng_state = run(case)
    torch.manual_seed(1)
    assert torch.equal(out, run(case)[0])
    assert not torch.equal(out, run(case)[0])
    assert rng_state.shape == (2,)
    assert_close(lse, reference(case._replace(options={"window_left": -1, "window_right": 0}))[1], torch.float32, "lse")

    # out is linear in value, and a small step in query and key moves it along their gradients: only with one dropout.
    g = torch.randn_like(out)
    grads = torch.autograd.grad(out, case.operands[:3], g)
    assert torch.allclose((out * g).sum(), (case.value * grads[2]).sum(), rtol=1e-4)
    for index in (0, 1):
        step = torch.randn_like(case.operands[index])
        results = []
        for sign in (1e-2, -1e-2):
            operands = list(case.operands)
            operands[index] = case.operands[index].detach() + sign * step
            torch.manual_seed(1)
            results.append((torch.ops.varlen_inductor.varlen_attn(*operands, **case.options)[0] * g).sum())
        slope = (results[0] - results[1]) / 2e-2
        assert torch.allclose(slope, (step * grads[index]).sum(), rtol=2e-2, atol=2e-2)

    case = make_case((16,), heads=(8, 8), dims=(16, 16), dropout_p=0.4)
    with torch.no_grad():
        mean = sum(run(case)[0].double() for _ in range(50)) / 50
    assert (mean - reference(case._replace(options={"window_left": -1, "window_right": -1}))[0]).abs().mean() < 0.05


@pytest.mark.parametrize(
    "check", ["check_lengths", "check_windows", "check_heads_and_dims", "check_positions", "check_strides", "check_dropout"]
)
def test_interpreted(check: str) -> None:
    interpret("ops/backends/test_triton_kernel", check)


def test_reasons() -> None:
    assert triton_kernel.supports(Problem(torch.device("cpu"), torch.bfloat16, 4, 4, 64, 64)) == "it runs on CUDA only"
