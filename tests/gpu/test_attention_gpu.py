"""The operator on CUDA, each backend against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import varlen_inductor
from attention_cases import LENGTHS, WINDOWS, assert_close, check_against_reference, make_case, reference, run
from paged_cases import in_pages
from varlen_inductor.ops.attention import varlen_attn, varlen_attn_backward
from varlen_inductor.ops.backends import choose
from varlen_inductor.ops.problem import Layout, Problem, Rule

CUDA = {"device": "cuda"}
HALF = (torch.bfloat16, torch.float16)
KERNELS = ("aten_flash", "triton")


@pytest.mark.parametrize("kernels", ["aten_flash", "triton", "math"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_and_windows(lengths: str, window: str, dtype: torch.dtype, kernels: str) -> None:
    options = {"window": WINDOWS[window], "dtype": dtype, "tail": 5, "kernels": kernels, **CUDA}
    check_against_reference(make_case(*LENGTHS[lengths], heads=(4, 4), dims=(64, 64), **options))
    check_against_reference(make_case(*LENGTHS[lengths], heads=(4, 2), dims=(64, 64), **options))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize(
    "dims", [(8, 8), (32, 32), (64, 64), (72, 72), (128, 128), (256, 256), (20, 20), (96, 64), (64, 128)], ids=str
)
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_heads_and_dims(kernels: str, heads: tuple[int, int], dims: tuple[int, int], window: str) -> None:
    case = make_case(
        (130, 1, 517, 64), window=WINDOWS[window], heads=heads, dims=dims, dtype=torch.bfloat16, kernels=kernels, **CUDA
    )
    check_against_reference(case)
    check_against_reference(case, lse_gradient=False)


@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (128, 128), (256, 256), (40, 72)], ids=str)
def test_float32(dims: tuple[int, int], window: str) -> None:
    case = make_case((130, 1, 217), window=WINDOWS[window], heads=(4, 2), dims=dims, kernels="triton", tail=4, **CUDA)
    check_against_reference(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", ["causal", "sliding"])
def test_positions(window: str, dtype: torch.dtype) -> None:
    positions = torch.cat([torch.randperm(600)[:400].sort().values, torch.randperm(300)]).cuda()
    options = {"position_q": positions, "position_k": positions.int()}
    case = make_case((400, 300), window=WINDOWS[window], heads=(4, 2), dims=(64, 64), dtype=dtype, **options, **CUDA)
    assert choose(Problem.of(*case.operands[:3], Layout(*case.operands[3:], **options), Rule(1.0, 0, 0))).backend.name == "triton"
    check_against_reference(case)


def test_triton_reads_any_strides() -> None:
    """A padded batch (B, S, 3, H, D) with unused keys full of NaN; heads first; an odd offset; an expanded gradient."""
    used = torch.tensor([50, 200, 0], dtype=torch.int32, device="cuda")
    options = {"seqused_k": used, "kernels": "triton", **CUDA}
    plain = make_case((200,) * 3, heads=(2, 2), dims=(64, 64), window=(-1, 0), dtype=torch.bfloat16, **options)
    expected, _ = reference(plain)
    qkv = torch.stack([x.detach() for x in plain.operands[:3]], 1)
    qkv[50:200, 1:] = qkv[400:, 1:] = float("nan")
    qkv.requires_grad_()
    wide = torch.nn.functional.pad(qkv, (3, 4))[..., 3:67]
    layouts = (qkv.unbind(1), [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv.unbind(1)], wide.unbind(1))
    g = torch.randn(600, 1, 1, dtype=torch.bfloat16, device="cuda").expand(600, 2, 64)
    wanted = torch.autograd.grad(expected, plain.operands[:3], g.double())
    for operands in layouts:
        out = varlen_attn(*operands, *plain.operands[3:], **plain.options)[0]
        assert_close(out, expected, torch.bfloat16, "out")
        (grad,) = torch.autograd.grad(out, qkv, g, retain_graph=True)
        for actual, expected_grad in zip(grad.unbind(1), wanted):
            assert_close(actual, expected_grad, torch.bfloat16, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_no_kernel_runs_is_computed_all_the_same(dtype: torch.dtype) -> None:
    check_against_reference(make_case((33, 0, 70), window=(-1, 0), heads=(4, 2), dtype=dtype, tail=3, **CUDA))


@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kernels", KERNELS)
def test_seqused_k(kernels: str, window: str, dropout_p: float) -> None:
    used = torch.tensor([4, 0, 9, 300], dtype=torch.int32, device="cuda")
    options = {"seqused_k": used, "kernels": kernels, **CUDA}
    case = make_case((5, 2, 6, 100), (7, 3, 9, 400), window=WINDOWS[window], dims=(64, 64), dtype=torch.bfloat16, **options)
    with torch.no_grad():
        for start, stop in ((4, 7), (7, 10), (319, 419)):
            case.key[start:stop] = float("nan")
            case.value[start:stop] = float("nan")
    case.options["dropout_p"] = dropout_p
    out, lse, _ = run(case)
    options = {k: v for k, v in case.options.items() if k != "dropout_p"}
    expected_out, expected_lse = reference(case._replace(options=options))
    if dropout_p == 0.0:
        assert_close(out, expected_out, out.dtype, "out")
    assert_close(lse, expected_lse, out.dtype, "lse")
    g = torch.randn_like(out)
    grads = torch.autograd.grad(out, case.operands[:3], g)
    assert all(grad.isfinite().all() for grad in grads)
    for grad in grads[1:]:
        assert (grad[4:10] == 0).all()
        assert (grad[319:419] == 0).all()
    inner = (case.value.double().nan_to_num() * grads[2].double()).sum()
    assert abs((out.double() * g.double()).sum() - inner) < 0.02 * (out.double() * g.double()).abs().sum()


def test_misaligned_operands_are_copied() -> None:
    plain = make_case((50, 70), heads=(2, 2), dims=(64, 64), dtype=torch.bfloat16, **CUDA)
    expected = run(plain)[0]
    shifted = []
    for x in plain.operands[:3]:
        wide = torch.zeros(x.shape[0], x.shape[1], 71, dtype=x.dtype, device="cuda")
        wide[..., 3:67] = x.detach()
        shifted.append(wide[..., 3:67])
    assert torch.equal(varlen_attn(*shifted, *plain.operands[3:])[0], expected)
    heads_first = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in plain.operands[:3]]
    out = varlen_attn(*heads_first, *plain.operands[3:])[0]
    assert out.is_contiguous()
    assert torch.equal(out, expected)
    for grad in torch.autograd.grad(out.sum(), heads_first):
        assert grad.is_contiguous()


def test_one_query_per_sequence_with_shared_heads() -> None:
    """With max_q 1 the kernels have a shortcut that takes every sequence to have exactly one query."""
    case = make_case((1, 0, 1), (30, 5, 12), heads=(8, 2), dims=(64, 64), dtype=torch.bfloat16, tail=4, **CUDA)
    check_against_reference(case._replace(max_q=1))


def test_right_window_wider_than_the_keys() -> None:
    """The kernels take a right side of max_k keys for no limit, which is wrong if there are more queries than keys."""
    check_against_reference(
        make_case((40, 30), (4, 30), window=(-1, 4), dims=(64, 64), dtype=torch.bfloat16, **CUDA)._replace(max_k=4)
    )


@pytest.mark.parametrize("kernels", KERNELS)
def test_dropout_backward_drops_the_same(kernels: str) -> None:
    options = {"dropout_p": 0.5, "kernels": kernels, **CUDA}
    case = make_case((130, 70), window=(-1, 0), heads=(4, 2), dims=(64, 64), dtype=torch.bfloat16, **options)
    torch.manual_seed(3)
    out = run(case)[0]
    torch.manual_seed(3)
    assert torch.equal(out, run(case)[0])
    assert not torch.equal(out, run(case)[0])
    g = torch.randn_like(out)
    (grad_value,) = torch.autograd.grad(out, case.value, g)
    left, right = (out.double() * g).sum(), (case.value.double() * grad_value).sum()
    assert abs(left - right) < 0.01 * (out.double() * g).abs().sum()


@pytest.mark.parametrize("kernels", KERNELS)
def test_dropout_is_right_in_expectation(kernels: str) -> None:
    case = make_case((40, 70), dims=(64, 64), dtype=torch.float16, dropout_p=0.25, kernels=kernels, **CUDA)
    with torch.no_grad():
        mean = sum(run(case)[0].double() for _ in range(2000)) / 2000
    expected, _ = reference(case._replace(options={"window_left": -1, "window_right": -1}))
    assert (mean - expected).abs().max() < 0.1


@pytest.mark.parametrize("window", ["full", "causal"])
def test_opcheck(window: str) -> None:
    case = make_case(
        (50, 0, 90), heads=(4, 2), dims=(32, 32), window=WINDOWS[window], dtype=torch.float16, tail=2, fill=0.0, **CUDA
    )
    opcheck(varlen_attn, case.operands, case.options)
    out, lse, rng_state = (x.detach() for x in run(case))
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    arguments = (torch.randn_like(out), torch.zeros_like(lse), out, lse, rng_state, *operands)
    opcheck(varlen_attn_backward, arguments, case.options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str, dynamic: bool) -> None:
    @torch.compile(mode=mode, dynamic=dynamic, fullgraph=True)
    def function(query: Tensor, key: Tensor, value: Tensor, cu_seq: Tensor) -> Tensor:
        out = varlen_inductor.varlen_attn(query * 2, key, value, cu_seq, cu_seq, 256, 256, window_size=(-1, 0))
        return out.cos()

    for lengths in ((50, 90), (256, 3), (17, 30)) * 2:
        case = make_case(lengths, heads=(4, 4), dims=(64, 64), dtype=torch.bfloat16, **CUDA)
        torch.compiler.cudagraph_mark_step_begin()
        out = function(*case.operands[:4])
        wanted, _ = reference(case._replace(query=case.query * 2, options={"window_left": -1, "window_right": 0}))
        assert_close(out, wanted.cos(), torch.bfloat16, "out")
        grads = torch.autograd.grad(out.sum(), case.operands[:3])
        for actual, expected in zip(grads, torch.autograd.grad(wanted.cos().sum(), case.operands[:3])):
            assert_close(actual, expected, torch.bfloat16, "gradient", factor=3.0)


@pytest.mark.parametrize("kernels", KERNELS)
def test_cuda_graph_with_new_lengths(kernels: str) -> None:
    """A recorded call follows offsets that change on the device, and rows behind the last sequence stay zero."""
    case = make_case((60, 40), dims=(64, 64), dtype=torch.bfloat16, tail=28, fill=0.0, **CUDA)
    static = [x.detach().clone() if isinstance(x, Tensor) else x for x in case.operands]
    static[4] = static[3]
    static[5] = static[6] = 128
    with torch.no_grad():
        varlen_attn(*static, kernels=kernels)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse, _ = varlen_attn(*static, kernels=kernels)
        for lengths in ((60, 40), (128, 0), (3, 2)):
            static[3].copy_(torch.tensor([0, lengths[0], sum(lengths)]))
            graph.replay()
            expected, expected_lse = reference(case._replace(cu_seq_q=static[3], cu_seq_k=static[3]))
            assert_close(out, expected, torch.bfloat16, "out")
            assert_close(lse, expected_lse, torch.bfloat16, "lse")


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (40, 72)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
def test_softcap(window: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    """Where the kernel keeps the largest score before it is capped, and where caps bite."""
    for softcap, scale in ((30.0, None), (0.5, None), (2.0, -0.5)):
        options = {"softcap": softcap, "scale": scale, "kernels": "triton", "tail": 3, **CUDA}
        case = make_case((130, 1, 217), window=WINDOWS[window], heads=(4, 2), dims=dims, dtype=dtype, **options)
        check_against_reference(case)


@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
def test_pages(window: str, page_size: int) -> None:
    """Read in place by Triton; gathered for the others, with the same result."""
    for dims in ((64, 64), (128, 128), (80, 48)):
        lengths = ((130, 1, 217, 1), (130, 300, 400, 0))
        plain = make_case(*lengths, window=WINDOWS[window], heads=(4, 2), dims=dims, dtype=torch.bfloat16, **CUDA)
        expected, expected_lse = reference(plain)
        for kernels in KERNELS:
            case = in_pages(plain, page_size)
            case.options["kernels"] = kernels
            out, lse, _ = run(case)
            assert_close(out, expected, torch.bfloat16, f"out of {kernels}")
            assert_close(lse, expected_lse, torch.bfloat16, f"lse of {kernels}")


def test_decoding_in_pages_under_a_cuda_graph() -> None:
    """One query a sequence; lengths and the table change on the device."""
    plain = make_case((1, 1, 1), (300, 5, 129), heads=(8, 2), dims=(128, 128), dtype=torch.bfloat16, **CUDA)
    case = in_pages(plain, 64)._replace(max_k=512)
    with torch.no_grad():
        run(case)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse, _ = run(case)
        for used in ((300, 5, 129), (7, 0, 64)):
            case.options["seqused_k"].copy_(torch.tensor(used))
            graph.replay()
            expected, expected_lse = reference(plain._replace(options={**plain.options, "seqused_k": case.options["seqused_k"]}))
            assert_close(out, expected, torch.bfloat16, "out")
            assert_close(lse, expected_lse, torch.bfloat16, "lse")


def test_out_is_written_in_place() -> None:
    case = make_case((130, 70), heads=(4, 2), dims=(64, 64), dtype=torch.bfloat16, tail=5, kernels="triton", **CUDA)
    expected, expected_lse, _ = run(case)
    with torch.no_grad():
        for out in (torch.empty_like(expected), torch.empty(4, 205, 64, dtype=torch.bfloat16, device="cuda").transpose(0, 1)):
            lse = torch.ops.varlen_inductor.varlen_attn_out(out, *case.operands, **case.options)
            assert torch.equal(out, expected)
            assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("lse_gradient", [False, True])
def test_deterministic(kernels: str, lse_gradient: bool) -> None:
    """The same gradients bit by bit, however often: with shared heads and long sequences, where sums are split up."""
    lengths = (1500, 3, 900, 2000)
    case = make_case(lengths, window=(-1, 0), heads=(8, 2), dims=(64, 64), dtype=torch.bfloat16, kernels=kernels, **CUDA)
    torch.use_deterministic_algorithms(True)
    try:
        g = torch.randn_like(case.query)
        found = []
        for _ in range(4):
            out, lse, _ = run(case)
            wanted = ((out * g).sum() + lse.sum()) if lse_gradient else (out * g).sum()
            found.append(torch.autograd.grad(wanted, case.operands[:3]))
        for again in found[1:]:
            assert all(map(torch.equal, found[0], again))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
def test_batch_does_not_change_a_sequence(window: str) -> None:
    """Bit by bit with num_splits 1, also where the batch's longest sequence would have another kernel chosen."""
    lengths = (1500, 7, 64, 300)
    case = make_case(lengths, window=WINDOWS[window], heads=(4, 2), dims=(64, 64), dtype=torch.bfloat16, **CUDA)
    options = {"window_size": WINDOWS[window], "enable_gqa": True, "num_splits": 1}
    with torch.no_grad():
        together = varlen_inductor.varlen_attn(*case.operands, **options)
        ends = case.cu_seq_q.tolist()
        for start, stop in itertools.pairwise(ends):
            cu_seq = torch.tensor([0, stop - start], dtype=torch.int32, device="cuda")
            rows = (x[start:stop] for x in case.operands[:3])
            alone = varlen_inductor.varlen_attn(*rows, cu_seq, cu_seq, stop - start, stop - start, **options)
            assert torch.equal(alone, together[start:stop])


def test_offsets_beyond_32_bits() -> None:
    """Rows so far apart that their offsets are no 32-bit numbers: 13 GB, of which little is used."""
    case = make_case((2, 1), heads=(2, 2), dims=(64, 64), dtype=torch.bfloat16, kernels="triton", **CUDA)
    expected = run(case)[0]
    wanted = torch.autograd.grad(expected.sum(), case.operands[:3])
    far = (1 << 30) + 64
    pool = torch.empty(6 * far, dtype=torch.bfloat16, device="cuda")
    for stride in ((2 * far, 64, 1), (64, 4 * far, 1), (128, 64, far // 16)):
        operands = []
        for i, x in enumerate(case.operands[:3]):
            strided = pool.as_strided(x.shape, stride, storage_offset=1024 * i)
            operands.append(strided.copy_(x.detach()))
        operands = [x.detach().requires_grad_() for x in operands]
        out = varlen_attn(*operands, *case.operands[3:], **case.options)[0]
        assert_close(out, expected, torch.bfloat16, "out")
        for actual, wanted_grad in zip(torch.autograd.grad(out.sum(), operands), wanted):
            assert_close(actual, wanted_grad, torch.bfloat16, "gradient")


def test_choice() -> None:
    problem = Problem(torch.device("cuda"), torch.bfloat16, 4, 4, 64, 64)
    assert choose(problem).backend.name != "math"
    assert choose(problem, "-triton,-cudnn,-flash4,-flash3,-flash2").backend.name == "aten_flash"
    assert "position" in choose(problem._replace(positions=True, window_right=0)).refused["aten_flash"]
    assert "float32" in choose(problem._replace(dtype=torch.float32)).refused["aten_flash"]
    assert "256" in choose(problem._replace(head_dim=264)).refused["aten_flash"]
    assert "softcap" in choose(problem._replace(softcap=2.0)).refused["aten_flash"]
    paged = problem._replace(paged=True, page_size=16, seqused_k=True)
    assert choose(paged).backend.name == "triton"
    assert not choose(paged).gathers
    assert choose(paged, "aten_flash").gathers
