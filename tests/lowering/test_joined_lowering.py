"""What Inductor makes of ``varlen_attn_backward_joined``: one direct call whose result is one tensor."""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import varlen_inductor.lowering  # noqa: F401  (registers the lowerings)
from attention_cases import Case, assert_close, make_case, run
from varlen_inductor.lowering import direct
from varlen_inductor.ops import backends
from varlen_inductor.ops.backends import cpu, fallback, math
from varlen_inductor.ops.joined import varlen_attn_backward_joined


def arguments(case: Case, lse_gradient: bool = False) -> list[Any]:
    """Those of the operator, but for the options."""
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    out, lse, rng_state = (x.detach() for x in run(case))
    return [torch.randn_like(out), torch.randn_like(lse) if lse_gradient else None, out, lse, rng_state, *operands]


def project(weight: Tensor, *args: Any, **options: Any) -> Tensor:
    """What a model's backward does with the result."""
    return varlen_attn_backward_joined(*args, kernels="auto", **options).sin() @ weight


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("lse_gradient", [False, True])
def test_one_direct_call(lse_gradient: bool, dynamic: bool) -> None:
    case = make_case((5, 9), heads=(4, 2), dims=(8, 4), window=(-1, 0), tail=2)
    given, weight = arguments(case, lse_gradient), torch.randn(56, 3)
    result, code = run_and_get_code(torch.compile(project, dynamic=dynamic, fullgraph=True), weight, *given, **case.options)
    number = "" if dynamic else "_1"
    found = re.findall(r"buf\d+ = (varlen\w*)\(", "\n".join(code))
    assert found == [f"varlen_inductor_lowering_direct_backward_joined{number}"]
    options = "window_right=0, kernels='auto'"
    sites = re.findall(r"= varlen_site\((.*)\)", "\n".join(code))
    assert sites == ([] if dynamic else [f"'backward_joined', {options}"])
    assert_close(result, project(weight, *given, **case.options), torch.float32, "projected gradients")


def test_other_numbers_of_tokens() -> None:
    compiled, weight = torch.compile(project, fullgraph=True, dynamic=True), torch.randn(48, 3)
    for lengths in ((5, 9), (7, 3, 1), (20,)):
        given = arguments(make_case(lengths))
        assert_close(compiled(weight, *given), project(weight, *given), torch.float32, "projected gradients")


def test_more_keys_than_queries_are_refused() -> None:
    given = arguments(make_case((5, 3), (9, 2)))
    with pytest.raises(Exception, match="query has 8 rows and key 11"):
        torch.compile(project, fullgraph=True)(torch.randn(48, 3), *given)


@pytest.mark.parametrize("data", [{}, {"seqused_k": torch.tensor([3, 9], dtype=torch.int32)}])
def test_sites_do_what_the_operator_does(data: dict[str, Tensor]) -> None:
    case = make_case((5, 9), window=(-1, 0))
    options = {**case.options, "tails_unread": True}
    differentiate = direct.site("backward_joined", kernels="auto", **options)
    for lse_gradient in (False, True, False):
        given = arguments(case, lse_gradient)
        expected = varlen_attn_backward_joined(*given, **options, **data)
        assert torch.equal(differentiate(*given, **data), expected)
        assert torch.equal(direct.backward_joined(*given, **options, **data), expected)


def test_a_site_has_its_kernel_write_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on with another one where that raises."""
    given = arguments(make_case((5, 9)))
    expected = varlen_attn_backward_joined(*given, kernels="math")
    written = []

    def into(grads: tuple[Tensor, ...], *args: Any) -> None:
        if written:
            raise RuntimeError("no luck")
        written.append([x.data_ptr() for x in grads])
        math.backward_into(grads, *args)  # type: ignore[arg-type]

    differentiate = direct.site("backward_joined", kernels="auto")
    monkeypatch.setattr(backends, "BACKENDS", (dataclasses.replace(cpu.BACKEND, backward_into=into), math.BACKEND))
    monkeypatch.setattr(backends, "_order", lambda problem, backward, host_counts: backends.BACKENDS)
    backends.choose.cache_clear()
    try:
        first = differentiate(*given)
        assert torch.equal(first, expected)
        assert written == [[first.data_ptr(), first[:, 16:].data_ptr(), first[:, 32:].data_ptr()]]
        with pytest.warns(RuntimeWarning, match="the kernel cpu raised RuntimeError: no luck"):
            assert torch.equal(differentiate(*given), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(differentiate(*given), expected)
    finally:
        backends.choose.cache_clear()
        fallback.forget()


@pytest.mark.slow
def test_in_cpp_wrapper_code() -> None:
    """Its code calls the operator."""
    case = make_case((5, 9), heads=(4, 2), window=(-1, 0))
    given, weight = arguments(case), torch.randn(64, 3)
    compiled = torch.compile(project, options={"cpp_wrapper": True}, fullgraph=True)
    # C++ that is kept calls the operator with as many arguments as it had when it was written.
    with torch._inductor.config.patch(force_disable_caches=True):
        result, code = run_and_get_code(compiled, weight, *given, **case.options)
    assert "varlen_inductor_lowering_direct" not in "\n".join(code)
    assert_close(result, project(weight, *given, **case.options), torch.float32, "projected gradients")


def test_not_ahead_of_time() -> None:
    """AOTInductor's code runs without the Python of the operator."""

    class Model(torch.nn.Module):
        def forward(self, weight: Tensor, *args: Any) -> Tensor:
            return project(weight, *args, 9, 9)

    given = arguments(make_case((5, 9)))[:-2]
    exported = torch.export.export(Model(), (torch.randn(48, 3), *given))
    with pytest.raises(Exception, match=r"varlen_attn_backward_joined\.default cannot be called by the code of AOTInductor"):
        torch._inductor.aoti_compile_and_package(exported)
