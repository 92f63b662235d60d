"""What is put around the kernels of flash-attn 2 and 3, on the CPU: stand-ins with the signatures of their releases.

They compute exactly, and have the kernels' limits: what each argument becomes is what is tested, not the kernels.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from test_aten_flash import limits, rule_of
from torch import Tensor
from torch.library import custom_op

from attention_cases import LENGTHS, WINDOWS, assert_close, check_against_reference, make_case, reference, run
from helpers import run_python
from varlen_inductor.ops import backends
from varlen_inductor.ops.backends import flash, packages
from varlen_inductor.ops.backends import math as exact
from varlen_inductor.ops.problem import Layout, Problem, Rule

# The arguments of each release, in order.
V2_6 = (
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size=(-1, -1), "
    "softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None",
    "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, "
    "softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, rng_state=None",
)
V2_8 = (
    "q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, "
    "dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1, "
    "softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False, block_table: Tensor | None = None, "
    "leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None, zero_tensors: bool = False",
    "dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None, dk: Tensor | None, "
    "dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, "
    "softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float, "
    "alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None, zero_tensors: bool = False",
)
V3_MAY_2025 = (
    "q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q, "
    "max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, "
    "softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
    "scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0",
    "dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, dq, dk, dv, "
    "softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0",
)
_OPTIONAL = "Tensor | None = None"
V3_MARCH_2026 = (
    f"q: Tensor, k: Tensor, v: Tensor, k_new: {_OPTIONAL}, v_new: {_OPTIONAL}, qv: {_OPTIONAL}, out_: {_OPTIONAL}, "
    f"cu_seqlens_q: {_OPTIONAL}, cu_seqlens_k: {_OPTIONAL}, cu_seqlens_k_new: {_OPTIONAL}, seqused_q: {_OPTIONAL}, "
    f"seqused_k: {_OPTIONAL}, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, page_table: {_OPTIONAL}, "
    f"kv_batch_idx: {_OPTIONAL}, leftpad_k: {_OPTIONAL}, rotary_cos: {_OPTIONAL}, rotary_sin: {_OPTIONAL}, "
    f"seqlens_rotary: {_OPTIONAL}, q_descale: {_OPTIONAL}, k_descale: {_OPTIONAL}, v_descale: {_OPTIONAL}, "
    "softmax_scale: float | None = None, causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, "
    "attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True, scheduler_metadata: Tensor | None = None, "
    "num_splits: int = 1, pack_gqa: bool | None = None, sm_margin: int = 0",
    f"dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, cu_seqlens_q: {_OPTIONAL}, "
    f"cu_seqlens_k: {_OPTIONAL}, sequed_q: {_OPTIONAL}, sequed_k: {_OPTIONAL}, max_seqlen_q: int | None = None, "
    f"max_seqlen_k: int | None = None, dq: {_OPTIONAL}, dk: {_OPTIONAL}, dv: {_OPTIONAL}, softmax_scale: float | None = None, "
    "is_causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, "
    "deterministic: bool = False, sm_margin: int = 0",
)
RELEASES = {"2.6.3": V2_6, "2.8.3": V2_8, "3 May 2025": V3_MAY_2025, "3 March 2026": V3_MARCH_2026}
TILE = 128


def package_of(release: str) -> flash.Package:
    return flash.FLASH2 if release.startswith("2") else flash.FLASH3


def layout_and_rule(given: dict[str, Any], used: Tensor | None) -> tuple[Layout, Rule]:
    left, right = given.get("window_size") or (given["window_size_left"], given["window_size_right"])
    max_q, max_k = given["max_seqlen_q"], given["max_seqlen_k"]
    layout = Layout(given["cu_seqlens_q"], given["cu_seqlens_k"], max_q, max_k, used)
    causal = given["causal"] if "causal" in given else given["is_causal"]
    if "dropout_p" in given:
        return layout, rule_of(layout, given["dropout_p"], causal, given["softmax_scale"], left, right)
    assert causal == ((left, right) == (-1, 0))
    return layout, Rule(given["softmax_scale"], -1 if left >= max_k - 1 else left, -1 if right >= max_q - 1 else right)


def check_what_is_read(version: int, layout: Layout, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> None:
    limits(layout, *queries, *keys)
    if version == 2:
        return
    assert layout.seqused_k is None
    for tensors, stops in ((queries, layout.cu_seq_q[1:]), (keys, layout.cu_seq_k[1:])):
        for x in tensors:
            for stop in stops.tolist():
                assert x[stop : stop + TILE].isfinite().all(), "blocks are read past the end"


def forward_of(version: int, eight: bool) -> Callable[[dict[str, Any]], Any]:
    def forward(given: dict[str, Any]) -> Any:
        layout, rule = layout_and_rule(given, given["seqused_k"])
        query, key, value = (given[x].detach() for x in "qkv")
        check_what_is_read(version, layout, (query,), (key, value))
        assert version == 3 or layout.max_q > 1 or query.shape[1] == key.shape[1]
        out, lse, rng_state = exact.forward(query, key, value, layout, rule)
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        out[int(layout.cu_seq_q[-1]) :] = lse[:, int(layout.cu_seq_q[-1]) :] = math.nan
        rng_state = rng_state.view(torch.int64) if rule.dropout_p else torch.empty(2, dtype=torch.int64)
        nothing = torch.empty(0)
        if version == 3:
            return out, lse, nothing, nothing.clone()
        return (out, query, key, value, out, lse, nothing, rng_state) if eight else (out, lse, nothing, rng_state)

    return forward


def backward_of(version: int) -> Callable[[dict[str, Any]], Any]:
    def backward(given: dict[str, Any]) -> Any:
        layout, rule = layout_and_rule(given, None)
        operands = [given[x] for x in ("dout", "q", "k", "v", "out")]
        grad_out, query, key, value, out = operands
        check_what_is_read(version, layout, (query, grad_out), (key, value))
        rng_state = torch.empty(0, dtype=torch.uint64)
        if rule.dropout_p:
            assert given["rng_state"].dtype == torch.int64
            rng_state = given["rng_state"].view(torch.uint64)
        lse = given["softmax_lse"]
        found = exact.backward(grad_out, None, out, lse, rng_state, query, key, value, layout, rule)
        for to, grad, ends in zip((given["dq"], given["dk"], given["dv"]), found, (layout[0], layout[1], layout[1]), strict=True):
            assert to.is_contiguous()
            to[: int(ends[-1])] = grad[: int(ends[-1])]
            to[int(ends[-1]) :] = math.nan
        return torch.empty(0)

    return backward


def made(name: str, signature: str, body: Callable[[dict[str, Any]], Any]) -> Any:
    scope = {"body": body, "Tensor": Tensor}
    exec(f"def {name}({signature}):\n    return body(locals())", scope)
    return scope[name]


def module_of(release: str) -> ModuleType:
    package, (forward, backward) = package_of(release), RELEASES[release]
    module = ModuleType(package.module)
    eight = release == "2.6.3"
    setattr(module, package.forward, made(package.forward, forward, forward_of(package.version, eight)))
    setattr(module, package.backward, made(package.backward, backward, backward_of(package.version)))
    return module


def forget() -> None:
    for cached in (packages.load, flash._functions, flash._unavailable, backends.choose):
        cached.cache_clear()


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    release: str = request.param
    package = package_of(release)
    monkeypatch.setitem(sys.modules, package.module, module_of(release))
    backend = flash.FLASH2_BACKEND if package.version == 2 else flash.FLASH3_BACKEND
    monkeypatch.setattr(backends, "BACKENDS", (dataclasses.replace(backend, supports=lambda problem: None),))
    forget()
    yield release
    forget()


@pytest.mark.parametrize("window", WINDOWS)
def test_lengths_and_windows(release: str, window: str) -> None:
    for lengths in LENGTHS.values():
        case = make_case(*lengths, heads=(4, 2), window=WINDOWS[window], dtype=torch.float64, tail=3)
        check_against_reference(case)


def test_head_dims_and_scales(release: str) -> None:
    for dims in ((5, 5), (16, 9), (3, 24)):
        check_against_reference(make_case((5, 7), window=(-1, 0), dims=dims, dtype=torch.float64))
    for scale in (-0.5, 0.0):
        check_against_reference(make_case((5, 7), window=(-1, 0), scale=scale, dtype=torch.float64))


def test_what_the_caller_holds_is_left_alone(release: str) -> None:
    case = make_case((5, 7), tail=3, dtype=torch.float64)
    held = [x.detach().clone() for x in case.operands[:5]]
    out, _, _ = run(case)
    torch.autograd.grad(out.sum(), case.operands[:3])
    for x, old in zip(case.operands[:5], held):
        assert torch.equal(x.detach().view(torch.int8), old.view(torch.int8))


def test_used_keys(release: str) -> None:
    used = torch.tensor([2, 0, 5], dtype=torch.int32)
    if package_of(release).version == 3:
        pytest.skip("refused")
    case = make_case((3, 2, 4), (6, 3, 9), dtype=torch.float64, seqused_k=used)._replace(max_k=5)
    out, lse, _ = run(case)
    expected, expected_lse = reference(case)
    assert_close(out, expected, torch.float64, "out")
    assert_close(lse, expected_lse, torch.float64, "lse")
    g, g_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(expected_lse == -math.inf, 0.0)
    grads = torch.autograd.grad((out, lse), case.operands[:3], (g, g_lse))
    loss = (expected * g).sum() + (expected_lse.masked_fill(expected_lse == -math.inf, 0.0) * g_lse).sum()
    for actual, wanted in zip(grads, torch.autograd.grad(loss, case.operands[:3])):
        assert_close(actual, wanted, torch.float64, "gradient")


def test_dropout(release: str) -> None:
    if package_of(release).version == 3:
        pytest.skip("version 3 has none")
    case = make_case((4, 3), (6, 3), heads=(4, 2), dtype=torch.float64, dropout_p=0.4)

    def function(*operands: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return torch.ops.varlen_inductor.varlen_attn(*operands, *case.operands[3:], **case.options)[:2]

    assert torch.autograd.gradcheck(function, case.operands[:3])


def test_custom_operators() -> None:
    """Releases make operators of their functions, whose own signature says nothing."""
    scope: dict[str, Any] = {"Tensor": Tensor, "body": forward_of(2, False)}
    exec(f"def function({V2_8[0]}) -> tuple[Tensor, Tensor, Tensor, Tensor]:\n    return body(locals())", scope)
    module = ModuleType("module")
    name = flash.FLASH2.forward
    operator = custom_op(f"varlen_inductor_test::{name}", scope["function"], mutates_args=())
    setattr(module, name, operator)
    package = flash.FLASH2._replace(namespaces=("varlen_inductor_nowhere", "varlen_inductor_test"))
    needed = flash._NEEDED[2, "forward"]
    understood = flash._understood(flash._function(package, module, name), name, needed)
    assert isinstance(understood, flash.Function)
    assert understood.names == {x: x for x in needed}
    case = make_case((3, 2), dtype=torch.float64)
    given = flash._common(package, *case.operands[:3], Layout(*case.operands[3:]), Rule(0.5))
    with torch.no_grad():
        out = understood(given | {"seqused_k": None, "dropout_p": 0.0, "return_softmax": False})[0]
    expected, _ = reference(case._replace(options={"window_left": -1, "window_right": -1, "scale": 0.5}))
    assert_close(out, expected, torch.float64, "out")
    assert isinstance(flash._understood(flash._function(flash.FLASH2, module, name), name, needed), str)


PROBLEM = Problem(torch.device("cuda", 0), torch.bfloat16, 4, 4, 64, 64)


def on(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
    forget()


def test_reasons(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, 9, 0)
    package = package_of(release)
    supports = (flash.FLASH2_BACKEND if package.version == 2 else flash.FLASH3_BACKEND).supports
    assert supports(PROBLEM) is None
    assert supports(PROBLEM._replace(device=torch.device("cpu"))) == "it runs on CUDA only"
    assert supports(PROBLEM._replace(dtype=torch.float32)) == "it computes in float16 or bfloat16, not torch.float32"
    assert supports(PROBLEM._replace(head_dim=257)) == "its head dim is at most 256, not 257"
    assert supports(PROBLEM._replace(positions=True, window_right=0)) == "a window that speaks of positions is unknown to it"
    assert supports(PROBLEM._replace(dropout_p=0.1)) == (None if package.version == 2 else "it has no dropout")
    reads_past = "it reads past the keys in use (seqused_k)"
    assert supports(PROBLEM._replace(seqused_k=True)) == (None if package.version == 2 else reads_past)
    if package.version == 2:
        assert supports(PROBLEM._replace(dropout_p=1.0)) == "it cannot drop everything"
        on(monkeypatch, 8, 6)
        assert supports(PROBLEM._replace(dropout_p=0.1, head_dim=256)) == (
            "with dropout its backward has head dims over 192 on A100 and H100 only"
        )
    on(monkeypatch, 7, 5)
    assert "and this device has 7.5" in (supports(PROBLEM) or "")
    monkeypatch.delitem(sys.modules, package.module)
    on(monkeypatch, 9, 0)
    assert (supports(PROBLEM) or "").startswith(f"{package.module} is not installed (")


def test_releases_that_are_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(package: flash.Package, forward: str, backward: str) -> str:
        module = ModuleType(package.module)
        setattr(module, package.forward, made(package.forward, forward, lambda given: None))
        setattr(module, package.backward, made(package.backward, backward, lambda given: None))
        monkeypatch.setitem(sys.modules, package.module, module)
        on(monkeypatch, 9, 0)
        return flash.supports(package, PROBLEM) or ""

    old2 = V2_8[0].replace(", seqused_k: Tensor | None = None", "").replace("softcap: float = 0.0, ", "")
    assert reason(flash.FLASH2, old2, V2_8[1]) == (
        "this release of flash_attn is not understood: _flash_attn_varlen_forward does not take softcap, seqused_k"
    )
    old3 = "q, k, v, softmax_scale, causal, window_size, descale_q=None, descale_k=None, descale_v=None, gqa_parallel=False"
    assert "_flash_attn_forward does not take cu_seqlens_q, cu_seqlens_k, max" in reason(flash.FLASH3, old3, V3_MAY_2025[1])
    assert reason(flash.FLASH3, "secret, " + V3_MAY_2025[0], V3_MAY_2025[1]) == (
        "this release of flash_attn_interface is not understood: _flash_attn_forward wants secret"
    )
    assert reason(flash.FLASH3, *V3_MAY_2025) == ""


def test_packages_are_found_without_being_imported() -> None:
    code = """
        import pathlib, sys, tempfile
        from varlen_inductor.ops.backends import packages

        site = pathlib.Path(tempfile.mkdtemp())
        sys.path.insert(0, str(site))
        assert not packages.installed("flash_attn.cute.interface")
        assert packages.load("flash_attn.cute.interface") == "flash_attn.cute.interface is not installed"
        (site / "flash_attn" / "cute").mkdir(parents=True)
        for name in ("cute/__init__", "cute/interface"):
            (site / "flash_attn" / f"{name}.py").write_text("import a_package_that_is_missing")
        packages.importlib.invalidate_caches()
        assert packages.installed("flash_attn.cute.interface")
        assert not packages.installed("flash_attn.flash_attn_interface")  # of version 2, which has the same name
        assert not [name for name in sys.modules if name.startswith("flash_attn")]
        packages.load.cache_clear()
        print(packages.load("flash_attn.cute.interface"))
    """
    assert run_python(code) == "import failed: ModuleNotFoundError: No module named 'a_package_that_is_missing'"


def test_nothing_is_imported_with_us() -> None:
    code = """
        import sys
        import varlen_inductor, varlen_inductor.ops.backends, varlen_inductor.ops.attention
        print([name for name in sys.modules if name.startswith("flash_attn") or "cutlass" in name])
    """
    assert run_python(code) == "[]"
