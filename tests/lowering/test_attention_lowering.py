"""What Inductor makes of varlen_attn: one direct call each way, right numbers, with and without dynamic sizes."""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import varlen_inductor
import varlen_inductor.lowering
from attention_cases import assert_close, make_case, reference
from helpers import MaskedAttention, padded_batch
from paged_cases import in_pages
from varlen_inductor.lowering import direct
from varlen_inductor.ops import attention, backends
from varlen_inductor.ops.backends import cpu, fallback, math


def attend(query: Tensor, key: Tensor, value: Tensor, cu_seq: Tensor) -> Tensor:
    return varlen_inductor.varlen_attn(query * 2, key, value, cu_seq, cu_seq, 16, 16, window_size=(-1, 0)).cos()


def calls(code: list[str]) -> list[str]:
    """The calls of ours whose results are assigned."""
    return re.findall(r"buf\d+ = (\S*varlen\w*(?:\.\w+)*)\(", "\n".join(code))


def sites(code: list[str]) -> list[str]:
    """What the sites of the code are made with."""
    return re.findall(r"= varlen_site\((.*)\)", "\n".join(code))


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_direct_call_each_way(dynamic: bool) -> None:
    case = make_case((5, 9), dims=(8, 4))
    compiled = torch.compile(attend, dynamic=dynamic, fullgraph=True)

    def step() -> tuple[Tensor, ...]:
        out = compiled(*case.operands[:4])
        return (out, *torch.autograd.grad(out.sum(), case.operands[:3]))

    (out, *grads), code = run_and_get_code(step)
    # Where heads and head dims are sizes that may change, each call looks at them.
    number = "" if dynamic else "_1"
    assert calls(code) == [f"varlen_inductor_lowering_direct_{function}{number}" for function in ("drawn", "backward")]
    options = "window_right=0, kernels='auto'"
    scale = f"scale={1 / 8**0.5}, "  # what was left out is a number once there is a gradient
    assert sites(code) == ([] if dynamic else [f"'drawn', {options}", f"'backward', {scale}{options}"])
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


@pytest.mark.parametrize("data", [{}, {"seqused_k": torch.tensor([3, 9], dtype=torch.int32)}])
def test_sites_do_what_the_operators_do(data: dict[str, Tensor]) -> None:
    case = make_case((5, 9), window=(-1, 0))
    options = {**case.options, "tails_unread": True}
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    attend, differentiate = (direct.site(function, kernels="auto", **options) for function in ("forward", "backward"))
    results = attention.varlen_attn(*operands, **options, **data)
    gradients = (torch.randn_like(results[0]), torch.randn_like(results[1]), *results)
    for grad_lse in (None, gradients[1]):
        gradients = (gradients[0], grad_lse, *results)
        for _ in range(2):
            for actual, expected in zip(attend(*operands, **data), results):
                assert torch.equal(actual, expected)
            expected_gradients = attention.varlen_attn_backward(*gradients, *operands, **options, **data)
            for actual, expected in zip(differentiate(*gradients, *operands, **data), expected_gradients):
                assert torch.equal(actual, expected)


def test_a_site_of_the_first_result_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a backend that can give it alone, and of one that gives all."""
    case = make_case((5, 9))
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    expected = attention.varlen_attn(*operands)[0]
    assert torch.equal(direct.site("drawn", alone=True, kernels="auto")(*operands)[0], expected)

    def forward_drawn(*args: Any, wants_lse: bool) -> Any:
        out, lse, _ = cpu.BACKEND.forward(*args)
        return out, lse if wants_lse else None

    alone = dataclasses.replace(cpu.BACKEND, forward_drawn=forward_drawn)
    monkeypatch.setattr(backends, "BACKENDS", (alone, math.BACKEND))
    backends.choose.cache_clear()
    try:
        out, nothing = direct.site("drawn", alone=True, kernels="auto")(*operands)
        assert nothing is None
        _, lse = direct.site("drawn", kernels="auto")(*operands)
        assert torch.equal(lse, attention.varlen_attn(*operands)[1])
        assert len(direct.site("forward", kernels="auto")(*operands)) == 3
    finally:
        backends.choose.cache_clear()
    assert torch.equal(out, expected)


def test_a_site_looks_again_when_bounds_change() -> None:
    attend = direct.site("forward", kernels="auto")
    for lengths in ((5, 9), (3, 2), (1030,)):
        case = make_case(lengths)
        operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
        assert torch.equal(attend(*operands)[0], attention.varlen_attn(*operands)[0])


def test_a_site_goes_on_with_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((5, 9))
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    expected = attention.varlen_attn(*operands, kernels="math")
    attend, differentiate = (direct.site(function, kernels="auto") for function in ("forward", "backward"))

    def broken(*args: object) -> None:
        raise RuntimeError("no luck")

    backend = dataclasses.replace(cpu.BACKEND, forward=broken, backward=broken)
    monkeypatch.setattr(backends, "BACKENDS", (backend, math.BACKEND))
    monkeypatch.setattr(backends, "_order", lambda problem, backward, host_counts: backends.BACKENDS)
    backends.choose.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="the kernel cpu raised RuntimeError: no luck"):
            attend(*operands)
        with pytest.warns(RuntimeWarning, match="the kernel cpu raised RuntimeError: no luck"):
            differentiate(expected[0], None, *expected, *operands)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(attend(*operands)[0], expected[0])
            differentiate(expected[0], None, *expected, *operands)
    finally:
        backends.choose.cache_clear()
        fallback.forget()


@pytest.mark.parametrize("wrong", ["size", "strides", "address"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_site_looks_at_what_a_kernel_gives_first(joined: bool, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code does not, so one whose results are not as the graph was told is not taken at its word."""
    case = make_case((5, 9), heads=(2, 2))
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    results = attention.varlen_attn(*operands, kernels="math")
    gradients = attention.varlen_attn_backward(results[0], None, *results, *operands, kernels="math")

    def spoilt(x: Tensor) -> Tensor:
        if wrong == "size":
            return x[:-1]
        if wrong == "strides":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)

    def forward(*args: Any) -> Any:
        return results[0], spoilt(results[1]), results[2]

    def backward(*args: Any) -> Any:
        return gradients[0], gradients[1], spoilt(gradients[2])

    backend = dataclasses.replace(cpu.BACKEND, forward=forward, backward=backward, backward_into=None)
    monkeypatch.setattr(backends, "BACKENDS", (backend, math.BACKEND))
    monkeypatch.setattr(backends, "_order", lambda problem, backward, host_counts: backends.BACKENDS)
    backends.choose.cache_clear()
    if joined:  # which makes one tensor of whatever it is given
        monkeypatch.setattr(direct, "backward_joined_by", lambda *args: spoilt(torch.cat([x.flatten(1) for x in gradients], 1)))
    attend = direct.site("forward", kernels="auto")
    differentiate = direct.site("backward_joined" if joined else "backward", kernels="auto")
    try:
        with pytest.warns(RuntimeWarning, match="the kernel cpu raised RuntimeError: lse is .* it must be "):
            found = attend(*operands)
        assert torch.equal(found[1], results[1])
        with pytest.warns(RuntimeWarning, match=r"the kernel cpu raised RuntimeError: the gradients? .*is \(.* it must be "):
            found = differentiate(results[0], None, *results, *operands)
        found = found if joined else torch.cat([x.flatten(1) for x in found], 1)
        assert torch.equal(found, torch.cat([x.flatten(1) for x in gradients], 1))
    finally:
        backends.choose.cache_clear()
        fallback.forget()


def test_results_that_nobody_can_give_are_no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last kernel, too, is looked at, and a kernel of which it was said to be good is not looked at again."""
    case = make_case((5, 9))
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    looks: list[object] = []
    look_at = direct.look_at
    monkeypatch.setattr(direct, "look_at", lambda *args: looks.append(args) or look_at(*args))
    attend = direct.site("drawn", kernels="auto")
    for _ in range(3):
        attend(*operands)
    assert len(looks) == 1
    backend = dataclasses.replace(math.BACKEND, forward=lambda *args: [x[1:] for x in math.BACKEND.forward(*args)])
    monkeypatch.setattr(backends, "BACKENDS", (backend,))
    backends.choose.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"out is \(13, .*; it must be \(14, "):
            direct.site("drawn", kernels="auto")(*operands)
    finally:
        backends.choose.cache_clear()


def test_a_site_reads_pages_by_a_kernel_that_cannot() -> None:
    case = in_pages(make_case((5, 9)), page_size=4)
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    tensors = {name: case.options[name] for name in ("seqused_k", "block_table")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no kernel raises on its way
        out, _, _ = direct.site("forward", kernels="cpu")(*operands, **tensors)
    assert torch.equal(out, attention.varlen_attn(*operands, **case.options)[0])


@pytest.mark.parametrize("packing", ["model", "attention", "pass"])
def test_the_kernels_of_the_options_run(packing: str) -> None:
    if packing == "pass":
        options = {"pre_grad_custom_pass": varlen_inductor.VarlenPass(kernels="math")}
        compiled = torch.compile(MaskedAttention(), options=options)
    else:
        options = {"varlen.kernels": "math", "varlen.packing": packing, "varlen.round_tokens": 4}
        compiled = torch.compile(MaskedAttention(), backend="varlen_inductor", options=options)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, code = run_and_get_code(compiled, *padded_batch())
    assert sites(code)
    assert all("kernels='math'" in site for site in sites(code))


def test_code_says_what_its_sites_know() -> None:
    """Code from the caches is loaded once by what it says, and its number differs from process to process only."""
    case = make_case((5, 11), heads=(3, 3))
    found = set()
    for dtype in (torch.float32, torch.float64):
        for deterministic in (False, True):
            torch._dynamo.reset()
            operands = [x.detach().to(dtype) for x in case.operands[:3]]
            torch.use_deterministic_algorithms(deterministic)
            try:
                with torch._inductor.config.patch(benchmark_harness=False, force_disable_caches=True):
                    _, code = run_and_get_code(torch.compile(attend), *operands, case.cu_seq_q)
            finally:
                torch.use_deterministic_algorithms(False)
            found.add("\n".join(line for text in code for line in text.splitlines() if "varlen" in line))
    assert len(found) == 4


def test_a_site_where_only_the_number_of_tokens_is_open() -> None:
    compiled = torch.compile(attend, fullgraph=True)
    first, second = make_case((5, 9)), make_case((7, 3, 1))

    def step() -> list[Tensor]:
        return [compiled(*case.operands[:4]) for case in (first, second)]

    for case in (first, second):
        for x in case.operands[:4]:
            torch._dynamo.mark_dynamic(x, 0)
    outs, code = run_and_get_code(step)
    assert len(code) == 2  # forward and backward, for both
    assert sites(code)[0] == "'drawn', window_right=0, kernels='auto'"
    assert not any("assert_" in line and "varlen_attn" in line for text in code for line in text.splitlines()), "sites look"
    for case, out in zip((first, second), outs):
        assert torch.allclose(out, attend(*case.operands[:4]), atol=1e-5)


@pytest.mark.parametrize("read", ["out", "lse", "both"])
def test_code_says_which_results_it_reads(read: str) -> None:
    case = make_case((5, 9))
    operands = [x.detach() for x in case.operands[:3]]

    def results(query: Tensor, key: Tensor, value: Tensor, cu_seq: Tensor) -> list[Tensor]:
        aux = varlen_inductor.AuxRequest(lse=True)
        out, lse = varlen_inductor.varlen_attn(query, key, value, cu_seq, cu_seq, 16, 16, return_aux=aux)
        return {"out": [out.cos()], "lse": [lse.cos()], "both": [out, lse]}[read]

    compiled = torch.compile(results, fullgraph=True, dynamic=False)
    found, code = run_and_get_code(compiled, *operands, case.cu_seq_q)
    assert sites(code) == ["'drawn', kernels='auto'" + (", alone=True" if read == "out" else "")]
    for actual, expected in zip(found, results(*operands, case.cu_seq_q)):
        assert torch.allclose(actual, expected, atol=1e-5)


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
@pytest.mark.parametrize("packing", ["model", pytest.param("attention", marks=pytest.mark.thorough)])
def test_in_cpp_wrapper_code(packing: str) -> None:
    """Its code calls the operator, forward and backward."""
    model, (x, valid) = MaskedAttention(), padded_batch()
    options = {"cpp_wrapper": True, "varlen.packing": packing, "varlen.round_tokens": 4}
    compiled = torch.compile(model, backend="varlen_inductor", options=options)
    x.requires_grad_()
    out, expected = compiled(x, valid)[valid], model(x, valid)[valid]
    assert torch.allclose(out, expected, atol=1e-5)
    (grad,), (expected_grad,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
    assert torch.allclose(grad, expected_grad, atol=1e-5)
