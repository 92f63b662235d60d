"""`varlen_attn_backward_joined`: what `varlen_attn_backward` returns, in one tensor."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention_cases import LENGTHS, Case, assert_close, check_backward_into, make_case, run
from varlen_inductor.ops import backends
from varlen_inductor.ops.attention import varlen_attn_backward
from varlen_inductor.ops.backends import cpu, fallback, math
from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.joined import varlen_attn_backward_joined

WIDTH = 2 * 8 * 3
"""Of the joined gradients of a case as it is made by default."""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    fallback.forget()
    backends.choose.cache_clear()
    yield
    fallback.forget()
    backends.choose.cache_clear()


def arguments(case: Case, lse_gradient: bool = False) -> tuple[Any, ...]:
    """Those of both operators, but for the options."""
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    out, lse, rng_state = (x.detach() for x in run(case))
    return torch.randn_like(out), torch.randn_like(lse) if lse_gradient else None, out, lse, rng_state, *operands


def joined(grads: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.flatten(1) for x in grads], 1)


def check(case: Case, lse_gradient: bool = False) -> Tensor:
    given = arguments(case, lse_gradient)
    actual, expected = varlen_attn_backward_joined(*given, **case.options), varlen_attn_backward(*given, **case.options)
    assert actual.is_contiguous()
    assert actual.dtype == case.query.dtype
    assert torch.equal(actual, joined(expected))
    return actual


@pytest.mark.parametrize("kernels", ["cpu", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (8, 24), (24, 8), (5, 3)], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
def test_the_three_gradients(heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, kernels: str) -> None:
    """Also where rows are no multiple of 16 bytes, behind the sequences, and where one of those is empty."""
    for window in ((-1, -1), (-1, 0), (3, 1)):
        case = make_case((5, 0, 17), heads=heads, dims=dims, window=window, dtype=dtype, tail=3, kernels=kernels)
        assert (check(case)[22:] == 0).all()
        check(case, lse_gradient=True)


def test_sequences_of_keys_and_of_queries_differ() -> None:
    check(make_case((9, 0, 4), (3, 10, 0), tail=1))
    check(make_case((5, 9), window=(-1, 0), seqused_k=torch.tensor([3, 9], dtype=torch.int32)))
    positions = torch.arange(14).flip(0)
    check(make_case((5, 9), window=(4, 2), softcap=3.0, position_q=positions, position_k=positions))


def test_tails_that_nobody_reads() -> None:
    case = make_case((5, 9), tail=4, fill=0.0, tails_unread=True)
    given = arguments(case)
    actual = varlen_attn_backward_joined(*given, **case.options)
    assert torch.equal(actual[:14], joined(varlen_attn_backward(*given, **case.options))[:14])


def test_dropout() -> None:
    assert check(make_case((5, 9), dropout_p=0.4)).any()


def test_nothing_to_attend() -> None:
    assert check(make_case((0, 0))).shape == (0, WIDTH)
    assert not check(make_case((), tail=3)).any()
    assert not check(make_case((0, 0), tail=3)).any()


def test_strided_operands() -> None:
    case = make_case((5, 9))
    qkv = torch.stack([x.detach() for x in case.operands[:3]], 1)
    check(case._replace(query=qkv[:, 0], key=qkv[:, 1], value=qkv[:, 2].transpose(0, 1).contiguous().transpose(0, 1)))


def test_more_keys_than_queries_are_refused() -> None:
    case = make_case((5, 3), (9, 2))
    given = arguments(case)
    with pytest.raises(RuntimeError, match="query has 8 rows and key 11; gradients can be joined only if"):
        varlen_attn_backward_joined(*given)
    with pytest.raises(RuntimeError, match="query has 8 rows and key 11"):
        varlen_attn_backward_joined(*(x.to("meta") if isinstance(x, Tensor) else x for x in given))


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
def test_opcheck(heads: tuple[int, int]) -> None:
    case = make_case((5, 0, 9), heads=heads, dims=(8, 16), window=(-1, 0), tail=2, fill=0.0)
    for lse_gradient in (False, True):
        torch.library.opcheck(varlen_attn_backward_joined, arguments(case, lse_gradient), case.options)


def test_tags_are_those_of_the_backward() -> None:
    assert varlen_attn_backward_joined.tags == varlen_attn_backward.tags


def test_flops_are_those_of_the_backward() -> None:
    case = make_case((5, 9), heads=(4, 2), dims=(8, 16))
    given = arguments(case)
    counts = []
    for op in (varlen_attn_backward_joined, varlen_attn_backward):
        with FlopCounterMode(display=False) as counter:
            op(*given)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 4 * (25 + 81) * (3 * 8 + 2 * 16)


def test_second_derivative_is_refused() -> None:
    case = make_case((5,))
    given = arguments(case)
    grads = varlen_attn_backward_joined(*given[:5], *case.operands)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grads.sum(), case.query)


def recording(backend: Any, calls: list[str], error: Exception | None = None) -> Any:
    """The backend, which notes the names of its backward functions; with an error, ``backward_into`` raises it."""

    def note(name: str) -> Any:
        def call(*args: Any) -> Any:
            calls.append(f"{backend.name} {name}")
            if error is not None and name == "backward_into":
                raise error
            return getattr(backend, name)(*args)

        return call

    return dataclasses.replace(backend, backward=note("backward"), backward_into=note("backward_into"))


def use(monkeypatch: pytest.MonkeyPatch, *those: Any) -> None:
    monkeypatch.setattr(backends, "BACKENDS", those)
    monkeypatch.setattr(backends, "_order", lambda problem, backward, host_counts: backends.BACKENDS)
    backends.choose.cache_clear()


def test_a_kernel_writes_it_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it can, if nothing has a gradient but out, and if rows begin at multiples of 16 bytes."""
    calls: list[str] = []
    case, odd = make_case((5, 3)), make_case((5, 3), dims=(8, 5))
    plain, with_lse, unaligned = arguments(case), arguments(case, lse_gradient=True), arguments(odd)
    use(monkeypatch, recording(cpu.BACKEND, calls))
    for given in (plain, with_lse, unaligned):
        varlen_attn_backward_joined(*given)
    use(monkeypatch, dataclasses.replace(recording(cpu.BACKEND, calls), backward_into=None))
    varlen_attn_backward_joined(*plain)
    assert calls == ["cpu backward_into", *["cpu backward"] * 3]


def test_a_kernel_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    case = make_case((5, 3))
    given = arguments(case)
    expected = joined(varlen_attn_backward(*given))
    use(monkeypatch, recording(cpu.BACKEND, calls, RuntimeError("broken")), recording(math.BACKEND, calls))
    with pytest.warns(RuntimeWarning, match="the kernel cpu raised RuntimeError: broken. math runs"):
        assert_close(varlen_attn_backward_joined(*given), expected, torch.float32, "joined")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(varlen_attn_backward_joined(*given), expected, torch.float32, "joined")
    assert calls == ["cpu backward_into", "math backward_into", "math backward_into"]


@pytest.mark.parametrize("backend", [cpu.BACKEND, math.BACKEND], ids=lambda backend: backend.name)
def test_only_the_gradients_are_written(backend: Backend) -> None:
    for lengths in LENGTHS.values():
        for window in ((-1, -1), (-1, 0)):
            check_backward_into(make_case(*lengths, heads=(4, 2), dims=(8, 16), window=window, tail=2), backend)
