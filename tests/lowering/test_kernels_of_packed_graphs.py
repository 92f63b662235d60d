"""Kernels that write lse by row are taken at their word, and all others are given and give it as they always do."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import varlen_inductor
from attention_cases import assert_close, make_case
from helpers import MaskedAttention, padded_batch
from varlen_inductor.lowering import attention, direct, drawn_seeds
from varlen_inductor.lowering.drawn_seeds import read_seeds_in_place
from varlen_inductor.ops import attention as operators
from varlen_inductor.ops import backends
from varlen_inductor.ops.backends import cpu, fallback, kept, math
from varlen_inductor.ops.problem import Layout, Rule

ASK = attention._chosen

seen: list[tuple[str, str]] = []
"""How the kernels' forwards gave lse, and how their backwards were given it."""

offsets: list[dict[Any, Any] | None] = []
"""What was kept with the offsets that the stand-in was given."""

drawn: list[list[int]] = []
"""The random numbers that the stand-in was given."""


def _order(lse: Tensor, layout: Layout) -> str:
    assert layout.lse_by_row or lse.is_contiguous()
    return "by row" if layout.lse_by_row else "as ever"


def _forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, rng_state = cpu.BACKEND.forward(query, key, value, layout, rule)
    seen.append(("forward", "by row" if layout.lse_by_row else "as ever"))
    lse = lse.t().contiguous() if layout.lse_by_row else lse
    offsets.append(kept.with_tensor(layout.cu_seq_q))
    return out, lse, rng_state


def _forward_as_told(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Drops what it is given numbers for."""
    if layout.seeds is None:
        return _forward(query, key, value, layout, rule)
    given = layout.seeds[layout.seeds_at :][:2]
    drawn.append(given.tolist())
    with pytest.MonkeyPatch.context() as context:
        context.setattr(math, "new_rng_state", lambda dropout_p, device: given.view(torch.uint64))
        return *_forward(query, key, value, layout, rule)[:2], torch.empty(0, dtype=torch.uint64)


def _backward(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rng_state, *others, layout, rule = rest
    seen.append(("backward", _order(lse, layout)))
    offsets.append(kept.with_tensor(layout.cu_seq_q))
    lse, numbers = lse.t() if layout.lse_by_row else lse, rng_state[layout.seeds_at :][:2]
    return cpu.BACKEND.backward(grad_out, grad_lse, out, lse.contiguous(), numbers, *others, layout, rule)


def _other_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    seen.append(("other backward", _order(lse, rest[-2])))
    return cpu.BACKEND.backward(grad_out, grad_lse, out, lse, *rest)


BY_ROW = dataclasses.replace(
    cpu.BACKEND, supports=lambda p: None, forward=_forward, backward=_backward, backward_into=None, lse_by_row=True
)
AS_TOLD = dataclasses.replace(BY_ROW, forward=_forward_as_told, takes_seeds=True)
OTHER = dataclasses.replace(math.BACKEND, name="other", supports=lambda p: None, backward=_other_backward, backward_into=None)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One that gives lse by row, and one that does not."""
    monkeypatch.setattr(backends, "BACKENDS", (BY_ROW, OTHER))
    monkeypatch.setattr(backends, "_order", lambda problem, backward, host_counts: backends.BACKENDS)
    monkeypatch.setattr(attention, "_chosen", _as_if_on_cuda)
    backends.choose.cache_clear()
    seen.clear()
    offsets.clear()
    drawn.clear()
    yield
    backends.choose.cache_clear()
    fallback.forget()


class OnCuda:
    """A fake of the CPU, but for the device's type, which the kernels of choice are asked for."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape, self.dtype, self.device = x, x.shape, x.dtype, torch.device("cuda", 0)


def _as_if_on_cuda(query: Any, key: Any, value: Any, *args: Any) -> Any:
    return ASK(OnCuda(query), OnCuda(key), OnCuda(value), *args)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", ["auto", "cpu", "other"])
def test_training(kernels: str) -> None:
    model, (x, valid) = MaskedAttention(), padded_batch()
    options = {"varlen.kernels": kernels, "varlen.round_tokens": 4}
    compiled = torch.compile(model, backend="varlen_inductor", options=options)
    x.requires_grad_()

    def step(function: Any) -> tuple[Tensor, ...]:
        out = function(x, valid)[valid]
        return (out.detach(), *torch.autograd.grad(out.square().sum(), (x, *model.parameters())))

    with torch._inductor.config.patch(force_disable_caches=True):
        found, code = run_and_get_code(lambda: step(compiled))
    for actual, expected in zip(found, step(model)):
        assert torch.allclose(actual, expected, atol=1e-5)
    forward, backward = re.findall(r"= varlen_site\((.*)\)", "\n".join(code))
    assert ("lse_by_row=True" in forward) == (kernels != "other")
    assert ("lse_by_row=True" in backward) == (kernels != "other")
    if kernels == "other":
        assert set(seen) == {("other backward", "as ever")}
    else:
        assert set(seen) == {("forward", "by row"), ("backward", "by row")}
        assert offsets[0] is not None
        assert all(found is offsets[0] for found in offsets), "the backward finds what the forward kept"


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(["cpu", "other"], repeat=2)))
def test_any_backward_follows_any_forward(first: str, second: str, joined: bool) -> None:
    case = make_case((5, 9), heads=(3, 3))
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    options: dict[str, Any] = {"tails_unread": True, "scale": 0.5}
    expected = operators.varlen_attn(*operands, **options, kernels="other")
    grad = torch.randn_like(expected[0])
    wanted = operators.varlen_attn_backward(grad, None, *expected, *operands, **options, kernels="other")
    function = "backward_joined" if joined else "backward"
    operator = getattr(torch.ops.varlen_inductor, f"varlen_attn_{function}")
    for forward, backward in (
        (operators.varlen_attn, operator),
        (direct.forward, getattr(direct, function)),
        (
            direct.site("forward", kernels=first, lse_by_row=True, **options),
            direct.site(function, kernels=second, lse_by_row=True, **options),  # type: ignore[arg-type]
        ),
    ):
        of_site = forward not in (operators.varlen_attn, direct.forward)
        given = {} if of_site else {**options, "kernels": first, "lse_by_row": True}
        out, lse, rng_state = forward(*operands, **given)
        assert lse.is_contiguous()
        for actual, one in zip((out, lse.t()), expected):
            assert_close(actual, one, torch.float32, "result")
        given = {} if of_site else {**options, "kernels": second, "lse_by_row": True}
        found = backward(grad, None, out, lse, rng_state, *operands, **given)
        found = found.split([x[0].numel() for x in operands[:3]], 1) if joined else found
        for actual, one in zip(found, wanted):
            assert_close(actual.reshape(one.shape), one, torch.float32, "gradient")


def test_a_kernel_that_fails_is_followed_by_one_that_does_as_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(backends, "BACKENDS", (dataclasses.replace(BY_ROW, forward=broken, backward=broken), OTHER))
    backends.choose.cache_clear()
    case = make_case((5, 9), heads=(3, 3))
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    with pytest.warns(RuntimeWarning, match="the kernel cpu raised RuntimeError: no luck"):
        results = direct.site("forward", kernels="auto", lse_by_row=True)(*operands)
    out, lse, rng_state = results
    assert lse.shape == (14, 3)
    with pytest.warns(RuntimeWarning, match="the kernel cpu raised RuntimeError: no luck"):
        direct.site("backward", kernels="auto", lse_by_row=True)(out, None, out, lse, rng_state, *operands)
    assert seen == [("other backward", "as ever")]


@pytest.mark.parametrize("lengths", [(5, 9), (1,), (0,), ()], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_the_operator(lengths: tuple[int, ...], heads: int) -> None:
    """Results are as the fake says, also where there is nothing to attend to; in eager mode they have a gradient."""
    case = make_case(lengths, heads=(heads, heads), lse_by_row=True)
    for kernels in ("cpu", "other"):
        options = {**case.options, "kernels": kernels}
        out, lse, _ = operators.varlen_attn(*case.operands, **options)
        plain = operators.varlen_attn(*case.operands, **{**options, "lse_by_row": False})
        assert torch.equal(lse.t(), plain[1])
        losses = [x.square().sum() + y.masked_fill(y.isinf(), 0.0).cos().sum() for x, y in ((out, lse), plain[:2])]
        grads, wanted = (torch.autograd.grad(loss, case.operands[:3]) for loss in losses)
        for actual, expected in zip(grads, wanted):
            assert torch.allclose(actual, expected, atol=1e-6)
        torch.library.opcheck(operators.varlen_attn, case.operands, options)


@pytest.mark.parametrize("rows", [14, 3])
def test_lse_by_row_that_is_turned_in_memory(rows: int) -> None:
    """By row it is (T, H) in any strides, also where these look like those of lse that was turned."""
    case = make_case((rows,), heads=(3, 3))
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    out, lse, rng_state = operators.varlen_attn(*operands)
    turned, grad = lse.t(), torch.randn_like(out)
    expected = operators.varlen_attn_backward(grad, None, out, lse, rng_state, *operands, kernels="other")
    for numbers in (rng_state, torch.tensor([3, 4])):

        def differentiate(grad: Tensor, turned: Tensor, numbers: Tensor = numbers) -> Any:
            options = {"lse_by_row": True, "kernels": "cpu"}
            return operators.varlen_attn_backward(grad, None, out, turned, numbers, *operands, **options)

        with pytest.MonkeyPatch.context() as context:
            context.setattr(backends, "BACKENDS", (AS_TOLD, OTHER))
            backends.choose.cache_clear()
            with torch._inductor.config.patch(force_disable_caches=True):  # what other code has made is not what is tested
                found = torch.compile(differentiate, dynamic=False)(grad, turned)
        for one, other in zip(found, expected):
            assert_close(one, other, torch.float32, "gradient")


def test_hooks_that_lose_strides() -> None:
    """What is saved is contiguous, as it was before: such hooks, ``save_on_cpu(pin_memory=True)`` among them, do no harm."""
    x, valid = padded_batch()
    model = Mixing(recompute=False).eval()
    compiled = torch.compile(lambda *args: model(*args).sin(), backend="varlen_inductor", options={"varlen.round_tokens": 4})
    anchor = torch.randn_like(x, requires_grad=True)
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone(memory_format=torch.contiguous_format)

    expected = torch.autograd.grad(model(x, anchor, valid).sin()[valid].square().sum(), anchor)[0]
    for hooks in (contextlib.nullcontext(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)):
        seen.clear()
        with hooks:
            out = compiled(x, anchor, valid)[valid]
        assert torch.allclose(torch.autograd.grad(out.square().sum(), anchor)[0], expected, atol=1e-5)
        assert set(seen) == {("forward", "by row"), ("backward", "by row")}
    assert packed
    assert all(saved.is_contiguous() for saved in packed)


# --- dropout ---------------------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Linear in ``x``: queries and keys come from elsewhere."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute

    def mix(self, x: Tensor, anchor: Tensor, valid: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (anchor, anchor.cos(), x))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :], dropout_p=0.4 * self.training)
        return x + F.dropout(y.transpose(1, 2).flatten(-2), 0.4, self.training)

    def forward(self, x: Tensor, anchor: Tensor, valid: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.mix, x, anchor, valid, use_reentrant=False) if self.recompute else self.mix(x, anchor, valid)
        return x


@pytest.mark.parametrize("fallback", [False, True], ids=["", "fallback_random"])
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpoint"])
def test_inductor_draws_the_numbers(recompute: bool, fallback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is linear in x is its gradient times x; with other weights dropped in the backward it would not be."""
    monkeypatch.setattr(backends, "BACKENDS", (AS_TOLD, OTHER))
    backends.choose.cache_clear()
    x, valid = padded_batch()
    anchor, model = torch.randn_like(x), Mixing(recompute)
    x.requires_grad_()
    with torch._inductor.config.patch(fallback_random=fallback, force_disable_caches=True):
        compiled = torch.compile(model, backend="varlen_inductor", options={"varlen.round_tokens": 4})
        outs = []
        for _ in range(3):
            torch.manual_seed(len(outs) // 2)
            y = compiled(x, anchor, valid)
            cotangent = torch.randn_like(y) * valid[..., None]
            (grad,) = torch.autograd.grad(y, x, cotangent)
            assert torch.allclose((y * cotangent).sum(), (grad * x).sum(), rtol=1e-4)
            outs.append(y.detach())
    assert torch.equal(outs[0], outs[1]), "the same seed"
    assert not torch.equal(outs[1], outs[2])
    calls = len(drawn) // 3
    assert calls >= 2
    if not fallback:
        assert max(abs(number) for numbers in drawn for number in numbers) > 2**32, "Inductor's own"
    assert len({tuple(numbers) for numbers in drawn[:calls]}) == 2, "every layer its own, in the backward again"
    assert {tuple(numbers) for numbers in drawn[-calls:]}.isdisjoint(map(tuple, drawn[:calls]))


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpoint"])
def test_numbers_are_read_where_they_were_drawn(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel for each layer copies its two numbers, all keep one tensor, and none random state for what is computed again."""
    monkeypatch.setattr(backends, "BACKENDS", (AS_TOLD, OTHER))
    backends.choose.cache_clear()
    x, valid = padded_batch()
    anchor, model = torch.randn_like(x), Mixing(recompute)
    x.requires_grad_()
    compiled = torch.compile(model, backend="varlen_inductor", options={"varlen.round_tokens": 4})
    with torch._inductor.config.patch(force_disable_caches=True):
        _, code = run_and_get_code(lambda: compiled(x, anchor, valid).sum().backward())
    packed = [one for one in code if "= varlen_site(" in one]
    assert len(packed) == 2
    forwards = [2, 2] if recompute else [2, 0]
    given = [re.findall(r"= varlen_\w+_drawn_\d+\(.*seeds=(\w+)\)", one) for one in packed]
    assert [len(found) for found in given] == forwards
    assert all(len(set(found)) <= 1 for found in given), "one tensor for all"
    places = [re.findall(r"= varlen_site\('(\w+)'.*seeds_at=(\d+)", one) for one in packed]
    assert [len({at for name, at in found if name == "drawn"}) for found in places] == forwards
    assert {at for name, at in places[1] if name == "backward"} == {at for _, at in places[0]}
    assert not any("rng_state" in one for one in packed)


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpoint"])
def test_without_dropout_no_random_state_is_kept(recompute: bool) -> None:
    """Nor an empty tensor for each layer, and no operator is called the long way where it is computed again."""
    x, valid = padded_batch()
    anchor, model = torch.randn_like(x), Mixing(recompute).eval()
    x.requires_grad_()
    compiled = torch.compile(model, backend="varlen_inductor", options={"varlen.round_tokens": 4})
    with torch._inductor.config.patch(force_disable_caches=True):
        _, code = run_and_get_code(lambda: compiled(x, anchor, valid).sum().backward())
    packed = [one for one in code if "= varlen_site(" in one]
    assert [one.count("= varlen_site('drawn'") for one in packed] == ([2, 2] if recompute else [2, 0])
    assert not any("rng_state" in one for one in packed)
    assert all(len(re.findall(r"empty_strided_\w+\(\(0, \)", one)) <= 1 for one in packed), "one for all"


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("more", ["", "returned", "positions"])
def test_attentions_are_told_where_their_numbers_are(more: str, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward drop as they did; who reads the two for something else gets them as before."""
    monkeypatch.setattr(backends, "BACKENDS", (AS_TOLD,))
    backends.choose.cache_clear()
    ops, lookup = torch.ops.varlen_inductor, torch.ops.prims.inductor_lookup_seed.default
    tokens = 2 if more == "positions" else 9
    rows, ends = torch.randn(tokens, 2, 8), torch.tensor([0, tokens], dtype=torch.int32)

    def step(seeds: Tensor, x: Tensor, cu: Tensor) -> tuple[Tensor, ...]:
        two = torch.stack([lookup(seeds, 3), lookup(seeds, 4)])
        options: dict[str, Any] = {"dropout_p": 0.5}
        if more == "positions":
            options |= {"position_q": two, "position_k": two, "window_left": 2**62}
        out, lse = ops.varlen_attn_drawn(x, x, x, cu, cu, tokens, tokens, **options, seeds=two)
        backward = ops.varlen_attn_backward_joined if joined else ops.varlen_attn_backward
        grads = backward(x, None, out, lse, two, x, x, x, cu, cu, tokens, tokens, **options)
        return out, lse, *([grads] if joined else grads), *([two] if more == "returned" else [])

    numbers = torch.arange(7) - 3
    module = make_fx(step, tracing_mode="fake", decomposition_table={torch.ops.aten.stack.default: _stack})(numbers, rows, ends)
    expected = module(numbers, rows, ends)
    assert read_seeds_in_place(module.graph) == 1
    module.graph.lint()
    module.recompile()
    for found, wanted in zip(module(numbers, rows, ends), expected, strict=True):
        assert torch.equal(found, wanted)
    attentions = [node for node in module.graph.nodes if node.target in drawn_seeds._PLACES]
    told = [node.kwargs.get("seeds_at") for node in attentions]
    assert told == ([None] * 2 if more == "positions" else [3] * 2)
    slices = module.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor)
    assert len(slices) == (1 if more else 0)
    assert not module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)


def _stack(parts: list[Tensor], dim: int = 0) -> Tensor:
    return torch.ops.aten.cat.default([torch.ops.aten.unsqueeze.default(x, dim) for x in parts], dim)


@pytest.mark.parametrize(
    ("kernels", "recompute", "takes_seeds"),
    [
        ("other,math,cpu", False, True),
        ("math", True, True),
        ("-cpu", False, False),
        *(
            pytest.param(*values, marks=pytest.mark.thorough)
            for values in itertools.product(("auto", "fastest", "-math", "cpu,math"), (False, True), (False, True))
        ),
    ],
)
def test_one_kernel_runs_both_ways(kernels: str, recompute: bool, takes_seeds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two drop the same, so the code names one, whatever is set when its backward runs."""
    first = dataclasses.replace(AS_TOLD if takes_seeds else BY_ROW, takes_seeds=takes_seeds)
    second = dataclasses.replace(first, name="math", lse_by_row=False)
    unable = dataclasses.replace(OTHER, supports=lambda problem: "it does not like it")
    monkeypatch.setattr(backends, "BACKENDS", (first, second, unable))
    backends.choose.cache_clear()
    x, valid = padded_batch()
    x.requires_grad_()
    options = {"varlen.round_tokens": 4, "varlen.kernels": kernels}
    compiled = torch.compile(Mixing(recompute), backend="varlen_inductor", options=options)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, code = run_and_get_code(functools.partial(_step, compiled, x, torch.randn_like(x), valid))
    sites = re.findall(r"= varlen_site\((.*)\)", "\n".join(code))
    # What draws is called as an operator where it is computed again, and is not there to be seen.
    assert len(sites) == (2 if recompute and not takes_seeds else 6 if recompute else 4)
    called = re.findall(r"varlen_attn\.default,.*?kernels='(.*?)'", "\n".join(code))
    assert len(called) == (4 if recompute and not takes_seeds else 0)
    expected = "math" if kernels in ("math", "-cpu", "other,math,cpu") else "cpu"
    assert [re.findall(r"kernels='(.*?)'", site) for site in sites] == [[expected]] * len(sites)
    assert called == [expected] * len(called)
    assert all(("lse_by_row=True" in site) == (expected == "cpu" and takes_seeds) for site in sites)


def _step(function: Any, x: Tensor, *args: Tensor) -> None:
    function(x, *args).sum().backward()


def test_seeds_differ_with_another_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes Inductor's decompositions: AOTAutograd takes two calls of an operator that it does not know for the same."""
    monkeypatch.setattr(backends, "BACKENDS", (AS_TOLD, OTHER))
    backends.choose.cache_clear()
    x, valid = padded_batch()
    x.requires_grad_()
    options = {"varlen.round_tokens": 4, "varlen.inner_backend": "aot_eager_decomp_partition"}
    compiled = torch.compile(Mixing(recompute=False), backend="varlen_inductor", options=options)
    _step(compiled, x, torch.randn_like(x), valid)
    assert len(drawn) == 2
    assert len({number for pair in drawn for number in pair}) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_memory_budget": 0.5},
        pytest.param({"activation_memory_budget": 0.01}, marks=pytest.mark.thorough),
        pytest.param({"aggressive_recomputation": True}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_seeds_are_kept_where_numbers_may_be_drawn_again(
    recompute: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of other dropout, too, which PyTorch by itself draws again, and others. A kernel that takes seeds is preferred."""
    monkeypatch.setattr(backends, "BACKENDS", (OTHER, AS_TOLD))
    backends.choose.cache_clear()
    x, valid = padded_batch()
    anchor = torch.randn_like(x)
    x.requires_grad_()
    compiled = torch.compile(Mixing(recompute), backend="varlen_inductor", options={"varlen.round_tokens": 4})
    with torch._inductor.config.patch(force_disable_caches=True), torch._functorch.config.patch(settings):
        y = compiled(x, anchor, valid)
        cotangent = torch.randn_like(y) * valid[..., None]
        (grad,) = torch.autograd.grad(y, x, cotangent)
    assert torch.allclose((y * cotangent).sum(), (grad * x).sum(), rtol=1e-4)
    assert len(drawn) == 4, "both are computed again"
    assert len(set(map(tuple, drawn))) == 2


@pytest.mark.parametrize("settings", [{"activation_memory_budget": 0.0}, {"activation_memory_budget": 0.5}], ids=str)
def test_where_dropout_is_wrong_it_is_said(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can be kept, or the numbers are drawn by the kernel or by PyTorch."""
    monkeypatch.setattr(backends, "BACKENDS", (AS_TOLD, OTHER))
    monkeypatch.setattr(attention, "_warn_once", attention._warn_once.__wrapped__)
    backends.choose.cache_clear()
    x, valid = padded_batch()
    x.requires_grad_()
    compiled = torch.compile(Mixing(recompute=False), backend="varlen_inductor", options={"varlen.round_tokens": 4})
    fallback_random = settings["activation_memory_budget"] > 0.0
    inductor = torch._inductor.config.patch(force_disable_caches=True, fallback_random=fallback_random)
    with inductor, torch._functorch.config.patch(settings), caplog.at_level("WARNING", "varlen_inductor"):
        _step(compiled, x, torch.randn_like(x), valid)
    assert drawn == []
    assert seen
    assert "gradients are then wrong" in caplog.text


def test_a_symbol_decides_nothing_with_dropout() -> None:
    """Forward and backward are given the same answer then, where else the run chooses."""
    with FakeTensorMode():
        rows = OnCuda(torch.empty(14, 2, 8))
        ends = torch.empty(3, dtype=torch.int32)
        size = torch.fx.experimental.symbolic_shapes.ShapeEnv().create_unbacked_symint()
        layout = Layout(ends, ends, size, size, tails_unread=True)
        assert ASK(rows, rows, rows, layout, Rule(1.0), None) == ()  # type: ignore[arg-type]
        assert ASK(rows, rows, rows, layout, Rule(1.0, dropout_p=0.5), None) == (BY_ROW, BY_ROW)  # type: ignore[arg-type]


@pytest.mark.parametrize("straight", [False, True])
def test_another_order_does_not_change_the_kernel_of_a_backward(straight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without graphs: as where deterministic algorithms are asked for between the two."""
    case = make_case((5, 9), dropout_p=0.5)
    given: Any = case.operands
    if straight:
        out = varlen_inductor.varlen_attn(*given, scale=case.options.get("scale"), dropout_p=0.5)
    else:
        out, _, _ = operators.varlen_attn(*given, **case.options)
    monkeypatch.setattr(backends, "_order", lambda problem, backward, host_counts: backends.BACKENDS[::-1])
    backends.choose.cache_clear()
    out.sum().backward()
    assert [name for name, _ in seen] == ["forward", "backward"]


def test_numbers_go_to_kernels_that_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", (OTHER, AS_TOLD))
    backends.choose.cache_clear()
    case = make_case((5, 9), dropout_p=0.5)
    problem = operators.Problem.of(*case.operands[:3], operators.split_arguments(case.query, *case.operands[3:])[0], Rule(1.0))
    refused = operators.choose(problem._replace(seeded=True)).refused
    assert refused == {"other": "it draws its own seeds"}
    numbers = torch.tensor([3, 4])
    results = []
    for _ in range(2):
        out, _, rng_state = operators.varlen_attn(*case.operands, **case.options, seeds=numbers)
        assert rng_state.numel() == 0
        results.append((out, *torch.autograd.grad(out.square().sum(), case.operands[:3])))
    for one, other in zip(*results):
        assert torch.equal(one, other)
    assert drawn == [[3, 4]] * 2
    total = operators.varlen_attn(*case.operands, **case.options, seeds=numbers)[0].sum()
    (grad,) = torch.autograd.grad(total, case.value)
    assert torch.allclose((grad * case.value).sum(), total, rtol=1e-4), "other weights are dropped in the backward"
    out, lse, rng_state = operators.varlen_attn(*[x.detach() if isinstance(x, Tensor) else x for x in case.operands])
    operators.varlen_attn_backward(out, None, out, lse, numbers, *case.operands, **case.options)
    assert {name for name, _ in seen} == {"forward", "backward"}, "the first kernel, which takes none, was asked"
    torch.library.opcheck(operators.varlen_attn, case.operands, {**case.options, "seeds": numbers})
    more = {"seeds": torch.tensor([8, 9, 3, 4, 7]), "seeds_at": 2}
    torch.library.opcheck(operators.varlen_attn, case.operands, {**case.options, **more})
    out, _, rng_state = operators.varlen_attn(*case.operands, **case.options, **more)
    for one, other in zip((out, *torch.autograd.grad(out.square().sum(), case.operands[:3])), results[0]):
        assert torch.equal(one, other)
    plain = {**case.options, "dropout_p": 0.0, "kernels": "other"}
    nothing_drawn = operators.varlen_attn(*case.operands, **plain, seeds=numbers)[0]
    assert torch.equal(nothing_drawn, operators.varlen_attn(*case.operands, **plain)[0])
    with pytest.raises(TypeError, match="seeds"):
        operators.varlen_attn(*case.operands, **case.options, seeds=numbers.int())
    for seeds, seeds_at in ((numbers[:1], 0), (numbers, 1), (numbers, -1), (numbers[:, None], 0)):
        with pytest.raises(ValueError, match=rf"seeds has shape .* and seeds_at is {seeds_at}; two entries from there on"):
            operators.varlen_attn(*case.operands, **case.options, seeds=seeds, seeds_at=seeds_at)
    with pytest.raises(ValueError, match="seeds_at is 2 and no seeds are given"):
        operators.varlen_attn(*case.operands, **case.options, seeds_at=2)
    for backward in (operators.varlen_attn_backward, torch.ops.varlen_inductor.varlen_attn_backward_joined):
        for state, reason in ((numbers, "two entries from there on"), (numbers.view(torch.uint64), "no seeds are given")):
            with pytest.raises(ValueError, match=reason):
                backward(out, None, out, lse, state, *case.operands, **case.options, seeds_at=1)


def test_it_is_asked_for_where_only_a_backward_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where nothing has to be done around the kernel."""
    rule = Rule(1.0)
    with FakeTensorMode():
        rows = torch.empty(14, 2, 8, device="cuda")
        ends, others = (torch.empty(3, dtype=torch.int32, device="cuda") for _ in range(2))
        packed = Layout(ends, ends, 9, 9, tails_unread=True)

        def ask(layout: Layout, rule: Rule, kernels: str | None) -> bool:
            return attention._is_one_launch(ASK(rows, rows, rows, layout, rule, kernels), layout, rule)

        assert ask(packed, rule, None)
        assert ask(packed, rule, "cpu")
        assert not ask(packed, rule, "other")
        assert not ask(packed, rule._replace(dropout_p=0.5), None), "it takes no seeds"
        assert not ask(packed._replace(tails_unread=False), rule, None), "the caller may read lse"
        assert not ask(packed._replace(cu_seq_k=others), rule, None), "queries may see no key"
        assert not ask(packed._replace(seqused_k=ends), rule, None), "queries may see no key"
        assert not ASK(*[x.cpu() for x in (rows, rows, rows)], packed, rule, None)
        assert not attention._is_one_launch((), packed, rule)
        for backward in (False, True):
            with monkeypatch.context() as context:
                problem = operators.Problem.of(rows, rows, rows, packed, rule)
                context.setattr(fallback, "_failed", {(problem, backward): frozenset({"cpu"})})
                assert not ask(packed, rule, None), "another kernel runs"
        size = torch.fx.experimental.symbolic_shapes.ShapeEnv().create_unbacked_symint()
        assert not ask(packed._replace(max_q=size), rule, None), "the choice is made when it runs"
