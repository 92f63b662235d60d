"""The Triton kernels against the reference, in Triton's interpreter. On a GPU: tests/gpu."""

from __future__ import annotations

import dataclasses
import tempfile

import pytest
import torch

from attention_cases import (
    LENGTHS,
    WINDOWS,
    assert_close,
    check_against_reference,
    check_backward_into,
    make_case,
    offsets,
    reference,
    run,
)
from paged_cases import in_pages, strided_table
from triton_interpreter import interpret, needs_interpreter
from varlen_inductor.ops import backends
from varlen_inductor.ops.attention import split_arguments
from varlen_inductor.ops.backends import triton_kernel
from varlen_inductor.ops.problem import Problem

pytestmark = needs_interpreter


def small_blocks_on_the_cpu() -> None:
    """Blocks so small that a short sequence has several of them, and not the same in a forward and its backward."""
    blocks = (triton_kernel.Blocks(queries, keys, 4, 1) for queries, keys in ((16, 16), (16, 32), (32, 16)))
    triton_kernel.OTHER.update(dict.fromkeys(triton_kernel.OTHER, triton_kernel.Tiles(*blocks)))
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
        mean = sum(run(case)[0].double() for _ in range(25)) / 25
    assert (mean - reference(case._replace(options={"window_left": -1, "window_right": -1}))[0]).abs().mean() < 0.07


def check_softcap() -> None:
    small_blocks_on_the_cpu()
    for softcap in (0.5, 20.0):
        for window in ((-1, -1), (-1, 0), (5, 3)):
            check_against_reference(make_case((20, 3), (35, 4), heads=(4, 2), window=window, softcap=softcap, tail=2))
    for scale in (-0.7, 0.0, 100.0):
        check_against_reference(make_case((20, 3), dims=(16, 24), window=(-1, 0), scale=scale, softcap=2.0))
    used = torch.tensor([9, 0, 20], dtype=torch.int32)
    check_against_reference(make_case((20, 20, 20), window=(-1, 0), softcap=2.0, seqused_k=used))


def check_pages() -> None:
    """Pages of whole blocks, of parts of one, and of what no block fits; without a key; with strides."""
    small_blocks_on_the_cpu()
    for page_size in (32, 16, 4, 12):
        for window in ((-1, -1), (-1, 0), (20, 3)):
            for lengths in (((20, 3, 1), (50, 40, 0)), ((35, 5), (20, 16))):
                plain = make_case(*lengths, heads=(2, 1), dims=(16, 8), window=window, softcap=3.0, tail=2)
                case = in_pages(plain, page_size)
                out, lse, _ = run(case)
                expected, expected_lse = reference(plain)
                assert_close(out, expected, torch.float32, "out")
                assert_close(lse, expected_lse, torch.float32, "lse")
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.key, case.value)]
    options = {**case.options, "block_table": strided_table(case.options["block_table"])}
    assert torch.equal(run(case._replace(key=heads_first[0], value=heads_first[1], options=options))[0], out)


def check_offsets_beyond_32_bits() -> None:
    """Rows, heads, dims and pages whose offset is no 32-bit number: in a file with holes, for so much memory is not needed."""
    small_blocks_on_the_cpu()
    plain = make_case((3, 2), heads=(2, 2), dims=(16, 16), window=(-1, 0), dtype=torch.float16)
    grad = torch.randn(5, 2, 16, dtype=torch.float16)
    expected, _, _ = run(plain)
    wanted = torch.autograd.grad(expected, plain.operands[:3], grad)
    for stride in ((FAR, 16, 1), (16, FAR, 1), (32, 16, FAR // 4), (FAR, FAR // 2, 1)):
        operands = [scattered(x.detach(), stride).requires_grad_() for x in plain.operands[:3]]
        out, _, _ = torch.ops.varlen_inductor.varlen_attn(*operands, *plain.operands[3:], **plain.options)
        assert torch.equal(out, expected), stride
        gradients = torch.autograd.grad(out, operands, scattered(grad, stride))
        assert all(map(torch.equal, gradients, wanted)), stride
    with torch.no_grad():
        pages = in_pages(plain, 2)
        pools = [scattered(x, (FAR, 32, 16, 1)) for x in (pages.key, pages.value)]
        assert torch.equal(run(pages._replace(key=pools[0], value=pools[1]))[0], expected)


FAR = (1 << 31) + 16


def scattered(x: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """A copy of ``x`` with these strides, in a file with holes, whose blocks exist where they are written only."""
    with tempfile.NamedTemporaryFile() as file:
        size = 1 + sum((n - 1) * s for n, s in zip(x.shape, stride))
        pool = torch.from_file(file.name, shared=True, size=size, dtype=x.dtype)
    return pool.as_strided(x.shape, stride).copy_(x)


def check_out() -> None:
    """Into a tensor that is there, heads first, with rows behind the last sequence."""
    small_blocks_on_the_cpu()
    case = make_case((20, 3), heads=(2, 1), dims=(16, 8), window=(-1, 0), tail=4)
    expected, expected_lse, _ = run(case)
    with torch.no_grad():
        for out in (torch.full((27, 2, 8), torch.nan), torch.full((2, 27, 8), torch.nan).transpose(0, 1)):
            lse = torch.ops.varlen_inductor.varlen_attn_out(out, *case.operands, **case.options)
            assert torch.equal(out, expected)
            assert torch.equal(lse, expected_lse)


def check_the_first_result_alone() -> None:
    """Bit by bit that of a forward; also of dropout, with the numbers that it drew."""
    small_blocks_on_the_cpu()
    for options in ({}, {"window": (5, 0)}, {"scale": -0.5}, {"scale": 0.0}, {"softcap": 2.0}, {"dropout_p": 0.5}):
        case = make_case((20, 0, 33), (7, 4, 40), heads=(2, 1), dims=(16, 8), tail=4, **options)
        for each in (case, in_pages(case, page_size=4)) if "dropout_p" not in options else (case,):
            layout, rule, _ = split_arguments(each.query, *each.operands[3:], **each.options)
            operands = [x.detach() for x in each.operands[:3]]
            expected, lse, rng_state = triton_kernel.forward(*operands, layout, rule)
            if rule.dropout_p > 0.0:
                given = (expected, None, expected, lse)
                gradients = triton_kernel.backward(*given, rng_state, *operands, layout, rule)
                seeds = torch.cat([torch.tensor([5]), rng_state.view(torch.int64)])
                layout = layout._replace(seeds=seeds, seeds_at=1)
                for found, wanted in zip(triton_kernel.backward(*given, seeds, *operands, layout, rule), gradients):
                    assert torch.equal(found, wanted)
            assert torch.equal(triton_kernel.forward_drawn(*operands, layout, rule, False)[0], expected)
            for found, wanted in zip(triton_kernel.forward_drawn(*operands, layout, rule, True), (expected, lse)):
                assert torch.equal(found, wanted)
            for found, wanted in zip(triton_kernel.forward(*operands, layout, rule), (expected, lse)):
                assert torch.equal(found, wanted)


def check_gradients_in_memory_that_is_there() -> None:
    small_blocks_on_the_cpu()
    for heads, dims in (((2, 2), (16, 16)), ((4, 2), (8, 24)), ((3, 1), (40, 20))):
        check_backward_into(make_case((20, 0, 33), heads=heads, dims=dims, window=(-1, 0), tail=3), triton_kernel.BACKEND)
    check_backward_into(make_case((20, 3), (35, 4), dims=(16, 16), scale=-0.5, tail=1), triton_kernel.BACKEND)
    used = torch.tensor([9, 0, 20], dtype=torch.int32)
    check_backward_into(make_case((20, 20, 20), dims=(16, 16), seqused_k=used, tail=2), triton_kernel.BACKEND)


def check_wide_windows() -> None:
    """A side that is no limit, added to a place, is no 32-bit number."""
    small_blocks_on_the_cpu()
    for window in ((2**31 - 1, 2**31 - 1), (2**40, 0), (2, 2**62)):
        check_against_reference(make_case((20, 3), (3, 30), window=window))


def check_batch() -> None:
    """A sequence's rows do not depend on the others, nor do their gradients on the run."""
    small_blocks_on_the_cpu()
    case = make_case((35, 5, 20), heads=(4, 2), window=(9, 0), dtype=torch.float16)
    out, lse, _ = run(case)
    for start, stop in ((0, 35), (35, 40), (40, 60)):
        ends = offsets((stop - start,))
        rows = (x[start:stop] for x in case.operands[:3])
        alone, alone_lse, _ = torch.ops.varlen_inductor.varlen_attn(*rows, ends, ends, stop - start, 64, **case.options)
        assert torch.equal(alone, out[start:stop])
        assert torch.equal(alone_lse, lse[:, start:stop])
    grads = [torch.autograd.grad(run(case)[0].sum(), case.operands[:3]) for _ in range(2)]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize(
    "check",
    [
        "check_lengths",
        "check_windows",
        "check_heads_and_dims",
        "check_positions",
        "check_strides",
        "check_dropout",
        "check_softcap",
        "check_pages",
        "check_offsets_beyond_32_bits",
        "check_wide_windows",
        "check_out",
        "check_the_first_result_alone",
        "check_gradients_in_memory_that_is_there",
        "check_batch",
    ],
)
def test_interpreted(check: str) -> None:
    interpret("ops/backends/test_triton_kernel", check)


def test_reasons() -> None:
    assert triton_kernel.supports(Problem(torch.device("cpu"), torch.bfloat16, 4, 4, 64, 64)) == "it runs on CUDA only"
