"""Softcap, keys in pages, batch invariance and determinism on the CPU, and under PyTorch's transformations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import varlen_inductor
from attention_cases import WINDOWS, Case, assert_close, check_against_reference, make_case, offsets, reference, run
from paged_cases import in_pages, strided_table
from varlen_inductor import AuxRequest
from varlen_inductor.ops.attention import varlen_attn, varlen_attn_backward
from varlen_inductor.ops.backends import choose
from varlen_inductor.ops.into import varlen_attn_out
from varlen_inductor.ops.problem import Layout, Problem, Rule

KERNELS = ("cpu", "math")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# --- softcap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("window", WINDOWS)
def test_softcap(window: str, kernels: str) -> None:
    for softcap, scale in ((0.3, None), (20.0, None), (2.0, -0.7), (2.0, 0.0)):
        options = {"softcap": softcap, "scale": scale, "kernels": kernels}
        check_against_reference(make_case((7, 0, 12), (9, 3, 12), heads=(4, 2), window=WINDOWS[window], tail=2, **options))


def test_softcap_gradcheck() -> None:
    used = torch.tensor([3, 1, 4], dtype=torch.int32)
    for window in ((-1, -1), (-1, 0), (2, 1)):
        case = make_case((3, 1, 4), (4, 2, 5), window=window, dtype=torch.float64, softcap=0.8, seqused_k=used)

        def function(*operands: Tensor, case: Case = case) -> tuple[Tensor, Tensor]:
            return varlen_attn(*operands, *case.operands[3:], **case.options)[:2]

        assert torch.autograd.gradcheck(function, case.operands[:3])


def test_softcap_of_the_function() -> None:
    case = make_case((5, 3))
    out, lse = varlen_inductor.varlen_attn(*case.operands, softcap=0.5, return_aux=AuxRequest(lse=True))
    expected, expected_lse = reference(case._replace(options={**case.options, "softcap": 0.5}))
    assert_close(out, expected, torch.float32, "out")
    assert_close(lse, expected_lse, torch.float32, "lse")
    assert not torch.allclose(lse, varlen_inductor.varlen_attn(*case.operands, return_aux=AuxRequest(lse=True))[1])


@pytest.mark.parametrize("softcap", [-1.0, float("inf"), float("nan")])
def test_softcap_that_is_none(softcap: float) -> None:
    with pytest.raises(ValueError, match=r"softcap is .*; it must be a positive number, or 0 for no cap"):
        varlen_inductor.varlen_attn(*make_case((5, 3)).operands, softcap=softcap)
    with pytest.raises(TypeError, match="softcap is NoneType; it must be a number, 0 for no cap"):
        varlen_inductor.varlen_attn(*make_case((5, 3)).operands, softcap=None)  # type: ignore[arg-type]


# --- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_pages(page_size: int, window: str) -> None:
    plain = make_case((3, 1, 5, 2), (6, 0, 9, 16), heads=(4, 2), dims=(8, 4), window=WINDOWS[window], softcap=2.0)
    expected, expected_lse = reference(plain)
    case = in_pages(plain, page_size)
    table = case.options["block_table"]
    for options in (case.options, {**case.options, "block_table": strided_table(table)}):
        out, lse, _ = run(case._replace(options=options))
        assert_close(out, expected, torch.float32, "out")
        assert_close(lse, expected_lse, torch.float32, "lse")


def call_in_pages(case: Case, **options: Any) -> Any:
    pages = {name: case.options[name] for name in ("seqused_k", "block_table")}
    operands = (*case.operands[:4], None, *case.operands[5:])
    return varlen_inductor.varlen_attn(*operands, **pages, enable_gqa=True, **options)


def test_gradient_through_pages() -> None:
    """The pages are gathered then, for no kernel has their gradient; the operator says so."""
    plain = make_case((3, 1), (6, 5), heads=(4, 2), dtype=torch.float64)
    case = in_pages(plain, 4)
    operands = [x.requires_grad_() for x in case.operands[:3]]
    assert_close(call_in_pages(case).detach(), reference(plain)[0], torch.float64, "out")
    g = torch.randn(4, 4, 8, dtype=torch.float64)
    grads = torch.autograd.grad(call_in_pages(case), operands, g)
    wanted = torch.autograd.grad(reference(plain)[0], plain.operands[:3], g)
    assert torch.allclose(grads[0], wanted[0])
    for pool, grad, rows in zip(case.operands[1:3], grads[1:], wanted[1:]):
        assert not grad[pool.isnan()].any()
        assert torch.allclose(grad.sum((0, 1)), rows.sum(0))
    with pytest.raises(RuntimeError, match=r"keys in pages have no gradient: call this under torch.no_grad\(\), or"):
        run(case)


def test_no_keys_in_pages() -> None:
    case = in_pages(make_case((3, 1), (6, 5)), 4)
    for changes in ({"block_table": torch.zeros(2, 0, dtype=torch.int32)}, {}):
        options = {**case.options, **changes, "seqused_k": torch.zeros(2, dtype=torch.int32)}
        out, lse, _ = run(case._replace(options=options))
        assert torch.equal(out, torch.zeros(4, 2, 8))
        assert torch.equal(lse, torch.full((2, 4), float("-inf")))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no lengths": ({"seqused_k": None}, ValueError, "block_table is given without seqused_k"),
    "positions": (
        {"position_q": torch.arange(4), "position_k": torch.arange(4)},
        ValueError,
        "block_table and positions are given; keys in pages have no positions",
    ),
    "table dtype": (
        {"block_table": torch.zeros(2, 3)},
        TypeError,
        r"block_table is torch.float32; .*block_table.to\(torch.int32\)",
    ),
    "table shape": (
        {"block_table": torch.zeros(3, 2, dtype=torch.int32)},
        ValueError,
        r"block_table has shape \(3, 2\); it must be \(2, pages_per_sequence\)",
    ),
    "key rank": (
        {"key": torch.zeros(8, 2, 8)},
        ValueError,
        r"key has shape \(8, 2, 8\); it must be \(pages, page_size, heads, head_",
    ),
    "value pages": ({"value": torch.zeros(7, 3, 2, 8)}, ValueError, r"value has shape \(7, 3, 2, 8\); it must have the \d pages"),
    "value page size": ({"value": torch.zeros(0, 3, 2, 8)}, ValueError, "value has pages of 3 keys and key of 4"),
    "heads": (
        {"query": torch.zeros(4, 4, 8), "enable_gqa": False},
        ValueError,
        "query has 4 heads and key 2; pass enable_gqa=True",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_says_what_is_wrong_with_pages(name: str) -> None:
    changes, error, message = WRONG[name]
    case = in_pages(make_case((3, 1), (6, 5)), 4)
    if "value" in changes and changes["value"].shape[0] == 0:
        changes = {"value": case.value.new_zeros(case.value.shape[0], 3, 2, 8)}
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    pages = {name: case.options[name] for name in ("seqused_k", "block_table")}
    with pytest.raises(error, match=message):
        varlen_inductor.varlen_attn(**{**dict(zip(names, case.operands)), **pages, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqused_k": (9, 5)}, r"seqused_k\[0\] is 9; it must lie between 0 and the 8 keys"),
        ({"block_table": ((0, 99), (1, 2))}, r"block_table\[0, 1\] is 99; it must be one of the \d pages of key"),
    ],
)
def test_debug_reads_the_pages(changes: dict[str, Any], message: str) -> None:
    case = in_pages(make_case((3, 1), (6, 5)), 4)
    case.options["block_table"] = case.options["block_table"][:, :2]
    with varlen_inductor.config.patch(debug=True):
        run(case)
        case.options.update({key: torch.tensor(value, dtype=torch.int32) for key, value in changes.items()})
        with pytest.raises(ValueError, match=message):
            run(case._replace(max_k=9))


def test_a_backend_without_pages_gets_them_gathered() -> None:
    problem = Problem(torch.device("cpu"), torch.float32, 2, 2, 8, 8, seqused_k=True, paged=True, page_size=4)
    choice = choose(problem)
    assert (choice.backend.name, choice.gathers) == ("cpu", True)
    assert choose(problem, "math").backend.name == "math"
    assert not choose(problem._replace(paged=False, page_size=0)).gathers


# --- one sequence and its neighbours -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
def test_batch_does_not_change_a_sequence(window: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, also where neighbours of the same length are computed together and where a sequence takes several blocks."""
    monkeypatch.setattr(varlen_inductor.ops.backends.math, "BLOCK_SCORES", 4096)
    for dtype, heads, softcap in itertools.product((torch.float32, torch.bfloat16), ((2, 2), (4, 2)), (0.0, 2.0)):
        lengths = (40, 7, 40, 40, 1, 33)
        case = make_case(lengths, heads=heads, dims=(16, 16), window=WINDOWS[window], dtype=dtype, softcap=softcap)
        options = {**case.options, "kernels": kernels, "batch_invariant": True}
        with torch.no_grad():
            together, lse, _ = varlen_attn(*case.operands, **options)
            for start, length in zip(offsets(lengths).tolist(), lengths):
                rows = slice(start, start + length)
                ends = offsets((length,))
                alone = varlen_attn(*(x[rows] for x in case.operands[:3]), ends, ends, length, length, **options)
                assert torch.equal(alone[0], together[rows])
                assert torch.equal(alone[1], lse[:, rows])


def test_the_kernel_is_chosen_by_the_sequence_alone() -> None:
    """The choice knows the longest sequence of the batch, unless that may make no difference."""
    case = make_case((5, 3))

    def problem(invariant: bool, max_q: int) -> Problem:
        return Problem.of(*case.operands[:3], Layout(*case.operands[3:5], max_q, max_q), Rule(1.0, batch_invariant=invariant))

    assert problem(False, 5) != problem(False, 5000)
    assert problem(True, 5) == problem(True, 5000)


def test_deterministic_problems(deterministic: None) -> None:
    case = make_case((5, 3))
    arguments = (*case.operands[:3], Layout(*case.operands[3:]), Rule(1.0))
    assert Problem.of(*arguments).deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert not Problem.of(*arguments).deterministic
    torch.use_deterministic_algorithms(False)
    assert not Problem.of(*arguments).deterministic


def test_determinism_is_asked_for_when_gradients_are_computed(monkeypatch: pytest.MonkeyPatch, deterministic: None) -> None:
    asked: list[tuple[bool, bool]] = []

    def watch(problem: Problem, kernels: str = "auto", backward: bool = False, *rest: Any) -> Any:
        asked.append((problem.deterministic, backward))
        return choose(problem, kernels, backward, *rest)

    monkeypatch.setattr(varlen_inductor.ops.attention, "choose", watch)
    case = make_case((5, 3))
    torch.use_deterministic_algorithms(False)
    outs = varlen_inductor.varlen_attn(*case.operands), run(case)[0]
    torch.use_deterministic_algorithms(True)
    for out in outs:
        out.sum().backward()
    assert asked == [(False, False)] * 2 + [(True, True)] * 2


# --- PyTorch's transformations ---------------------------------------------------------------------------------------


def test_opcheck() -> None:
    case = make_case((5, 0, 9), heads=(4, 2), window=(-1, 0), softcap=2.0, tail=2, fill=0.0, batch_invariant=True)
    torch.library.opcheck(varlen_attn, case.operands, case.options)
    out, lse, rng_state = (x.detach() for x in run(case))
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    torch.library.opcheck(
        varlen_attn_backward, (torch.randn_like(out), torch.randn_like(lse), out, lse, rng_state, *operands), case.options
    )
    torch.library.opcheck(varlen_attn_out, (torch.empty_like(out), *operands), case.options)
    pages = in_pages(case, 4)
    pages = pages._replace(key=pages.key.nan_to_num(), value=pages.value.nan_to_num())
    torch.library.opcheck(varlen_attn, pages.operands, pages.options)
    torch.library.opcheck(varlen_attn_out, (torch.empty_like(out), *pages.operands), pages.options)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    plain = make_case((5, 9), (6, 11), softcap=2.0)
    case = in_pages(plain, 4)
    compiled = torch.compile(call_in_pages, backend=backend, fullgraph=True)
    assert_close(compiled(case, softcap=2.0), reference(plain)[0], torch.float32, "out")

    @torch.compile(backend=backend, fullgraph=True)
    def function(*operands: Tensor) -> Tensor:
        return varlen_inductor.varlen_attn(*operands, *plain.operands[3:], softcap=2.0)

    g = torch.randn_like(plain.query)
    grads = torch.autograd.grad(function(*plain.operands[:3]), plain.operands[:3], g)
    for actual, wanted in zip(grads, torch.autograd.grad(reference(plain)[0], plain.operands[:3], g.double())):
        assert_close(actual, wanted, torch.float32, "gradient")
