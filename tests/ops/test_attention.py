"""The operator: what it computes against the reference, and how it behaves under PyTorch's transformations."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import varlen_inductor
from attention_cases import LENGTHS, WINDOWS, Case, assert_close, check_against_reference, make_case, reference, run
from varlen_inductor.ops.attention import varlen_attn, varlen_attn_backward, varlen_attn_drawn
from varlen_inductor.ops.backends import math

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HEADS = {"mha": (2, 2), "gqa": (6, 2), "mqa": (4, 1)}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_and_windows(lengths: str, window: str) -> None:
    check_against_reference(make_case(*LENGTHS[lengths], window=WINDOWS[window], tail=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dims", [(16, 16), (16, 8), (8, 24)], ids=str)
def test_heads_and_dtypes(dtype: torch.dtype, window: str, heads: str, dims: tuple[int, int]) -> None:
    case = make_case((5, 17, 2), window=WINDOWS[window], heads=HEADS[heads], dims=dims, dtype=dtype)
    check_against_reference(case)
    check_against_reference(case, lse_gradient=False)


@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
def test_seqused_k(window: str) -> None:
    used = torch.tensor([4, 0, 9], dtype=torch.int32)
    case = make_case((5, 2, 6), (7, 3, 9), window=WINDOWS[window], seqused_k=used)
    with torch.no_grad():
        for start, stop in ((4, 7), (7, 10)):  # unused keys may hold anything
            case.key[start:stop] = float("nan")
    out, lse, _ = run(case)
    expected_out, expected_lse = reference(case)
    assert_close(out, expected_out, out.dtype, "out")
    assert_close(lse, expected_lse, out.dtype, "lse")
    grads = torch.autograd.grad(out.sum(), case.operands[:3])
    for grad in grads[1:]:
        assert torch.equal(grad[4:10], torch.zeros_like(grad[4:10]))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("window", ["causal", "sliding", "sliding causal"])
def test_positions(window: str) -> None:
    """Rows of a padded batch whose mask has holes: the rule must speak of the places in the padded rows."""
    positions = torch.tensor([0, 3, 4, 9, 1, 2, 7, 5])
    case = make_case((4, 3, 1), window=WINDOWS[window], position_q=positions, position_k=positions)
    check_against_reference(case)
    other = torch.tensor([0, 0, 5, 9, 4, 4, 4, 5], dtype=torch.int32)
    check_against_reference(make_case((4, 3, 1), window=WINDOWS[window], position_q=other, position_k=positions))


def test_gradcheck() -> None:
    """In float64, through out and lse, for each way that the CPU computes it."""
    for window, heads, dims in itertools.product(("full", "causal", "sliding"), ((2, 2), (4, 2)), ((4, 4), (4, 6))):
        case = make_case((3, 0, 4), (3, 2, 5), window=WINDOWS[window], heads=heads, dims=dims, dtype=torch.float64)

        def function(*operands: Tensor, case: Case = case) -> tuple[Tensor, Tensor]:
            out, lse, _ = varlen_attn(*operands, *case.operands[3:], **case.options)
            return out, lse

        assert torch.autograd.gradcheck(function, case.operands[:3])


def test_lse_alone_has_a_gradient() -> None:
    case = make_case((5, 3), dtype=torch.float64)
    _, lse, _ = run(case)
    _, expected = reference(case)
    for actual, wanted in zip(
        torch.autograd.grad(lse.exp().sum(), case.operands[:2]), torch.autograd.grad(expected.exp().sum(), case.operands[:2])
    ):
        assert_close(actual, wanted, torch.float64, "gradient through lse")


def test_strides_do_not_matter() -> None:
    """Operands as slices of one projection, heads first, last dim strided; an expanded gradient."""
    plain = make_case((5, 8), heads=(2, 2), dims=(8, 8))
    qkv = torch.stack([x.detach() for x in plain.operands[:3]], 1).requires_grad_()
    heads_first = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in plain.operands[:3]]
    strided = [torch.stack([x.detach(), x.detach()], -1)[..., 0] for x in plain.operands[:3]]
    expected, _, _ = run(plain)
    for operands in (qkv.unbind(1), heads_first, strided):
        assert torch.allclose(varlen_attn(*operands, *plain.operands[3:])[0], expected, atol=1e-6)
    out = varlen_attn(*qkv.unbind(1), *plain.operands[3:])[0]
    (actual,) = torch.autograd.grad(out.sum(), qkv)
    wanted = torch.autograd.grad(expected.sum(), plain.operands[:3])
    assert torch.allclose(actual, torch.stack(wanted, 1), atol=1e-6)


def test_zero_tokens() -> None:
    check_against_reference(make_case((0, 0)))
    no_sequences = make_case((), tail=2)
    out, lse, _ = run(no_sequences)
    assert torch.equal(out, torch.zeros(2, 2, 8))
    assert torch.equal(lse, torch.full((2, 2), float("-inf")))
    assert torch.equal(torch.autograd.grad(out.sum(), no_sequences.key)[0], torch.zeros(2, 2, 8))
    check_against_reference(make_case((2, 1), (0, 0)))
    check_against_reference(make_case((0, 0), (2, 1)))


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_is_reproducible() -> None:
    case = make_case((6, 11), dropout_p=0.4)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(run(case)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(run(case)[0], run(case)[0])


@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
def test_dropout_backward_drops_the_same(window: str) -> None:
    case = make_case((3, 5), window=WINDOWS[window], heads=(4, 2), dtype=torch.float64, dropout_p=0.3)

    def function(*operands: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        out, lse, _ = varlen_attn(*operands, *case.operands[3:], **case.options)
        return out, lse

    assert torch.autograd.gradcheck(function, case.operands[:3], fast_mode=True)


def test_dropout_is_right_in_expectation() -> None:
    case = make_case((4, 7), window=(-1, 0), dropout_p=0.25)
    with torch.no_grad():
        mean = sum(run(case)[0].double() for _ in range(3000)) / 3000
        _, lse, _ = run(case)
    expected_out, expected_lse = reference(case._replace(options={"window_left": -1, "window_right": 0}))
    assert (mean - expected_out).abs().max() < 0.1
    assert_close(lse, expected_lse, torch.float32, "lse knows no dropout")


def test_nothing_left_to_be_drawn() -> None:
    """The operator of graphs behind autograd: the same results, and no word of random numbers to PyTorch."""
    case = make_case((4, 0, 3), window=(-1, 0), tail=2)
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    for found, expected in zip(varlen_attn_drawn(*operands, **case.options), run(case)):
        assert torch.equal(found, expected)
    tag = torch.Tag.nondeterministic_seeded
    assert tag in varlen_attn.tags
    assert tag not in varlen_attn_drawn.tags
    with pytest.raises(RuntimeError, match="varlen_attn_drawn has no gradient: use varlen_attn"):
        varlen_attn_drawn(*case.operands)
    for fake in (False, True):
        mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
        with mode, pytest.raises(ValueError, match=r"dropout_p is 0\.5 and no seeds are given"):
            varlen_attn_drawn(*operands, dropout_p=0.5)


def test_the_backward_is_asked_for_all_that_the_forward_was() -> None:
    """Otherwise another kernel could be chosen for it, which drops other weights."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op in (varlen_attn, varlen_attn_backward):
                asked.append({name: value for name, value in kwargs.items() if name != "kernels"})
            return op(*args, **(kwargs or {}))

    asked: list[dict[str, Any]] = []
    case = make_case((4, 3), heads=(2, 2))
    options = {"scale": 0.3, "window_left": 2, "window_right": 1, "dropout_p": 0.5, "softcap": 2.0, "batch_invariant": True}
    with Record():
        varlen_attn(*case.operands, **options)[0].sum().backward()
    assert asked == [options] * 2


def test_seeds_come_from_the_generator_of_the_device() -> None:
    """PyTorch sets no other back where a forward is computed again."""
    before = torch.get_rng_state()
    assert math.new_rng_state(0.5, torch.device("meta")).dtype == torch.uint64
    assert torch.equal(torch.get_rng_state(), before)
    math.new_rng_state(0.5, torch.device("cpu"))
    assert not torch.equal(torch.get_rng_state(), before)


def test_dropout_of_everything_and_of_nothing() -> None:
    assert torch.equal(run(make_case((4, 3), dropout_p=1.0))[0], torch.zeros(7, 2, 8))
    case = make_case((4, 3), dropout_p=1e-9)
    assert_close(run(case)[0], run(case._replace(options={}))[0], torch.float32, "nothing is dropped")


# --- PyTorch's transformations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["full", "causal"])
@pytest.mark.parametrize("heads", HEADS)
def test_opcheck(heads: str, window: str) -> None:
    case = make_case((5, 0, 9), heads=HEADS[heads], window=WINDOWS[window], tail=2, fill=0.0)
    opcheck(varlen_attn, case.operands, case.options)
    positions = torch.arange(16)
    options = {**case.options, "position_q": positions, "position_k": positions, "scale": 0.3}
    opcheck(varlen_attn, case.operands, options)

    out, lse, rng_state = (x.detach() for x in run(case))
    operands = [x.detach() if isinstance(x, Tensor) else x for x in case.operands]
    for by_row in (False, True):
        opcheck(varlen_attn_drawn, operands, {**case.options, "lse_by_row": by_row})
    for grad_lse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), grad_lse, out, lse, rng_state, *operands)
        opcheck(varlen_attn_backward, arguments, case.options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, dynamic: bool) -> None:
    @torch.compile(backend=backend, dynamic=dynamic, fullgraph=True)
    def function(query: Tensor, key: Tensor, value: Tensor, cu_seq: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = varlen_inductor.varlen_attn(
            query * 2, key, value, cu_seq, cu_seq, 16, 16, window_size=(-1, 0), return_aux=varlen_inductor.AuxRequest(lse=True)
        )
        return out.cos(), lse

    for lengths in ((5, 9), (16, 3)):
        case = make_case(lengths, dims=(8, 4))
        out, lse = function(*case.operands[:4])
        wanted_out, wanted_lse = reference(case._replace(query=case.query * 2, options={"window_left": -1, "window_right": 0}))
        assert_close(out, wanted_out.cos(), torch.float32, "out")
        grads = torch.autograd.grad(out.sum() + lse.sum(), case.operands[:3])
        wanted = torch.autograd.grad(wanted_out.cos().sum() + wanted_lse.sum(), case.operands[:3])
        for actual, expected in zip(grads, wanted):
            assert_close(actual, expected, torch.float32, "gradient")


def test_compiled_dropout_backward_drops_the_same() -> None:
    case = make_case((5, 9), dropout_p=0.5)
    operands = [x.detach().double().requires_grad_() for x in case.operands[:3]]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(*operands: Tensor) -> Tensor:
        return varlen_attn(*operands, *case.operands[3:], **case.options)[0]

    # out is linear in value: <out, g> = <value, its gradient> holds only for one and the same dropout.
    out = function(*operands)
    g = torch.randn_like(out)
    (grad_value,) = torch.autograd.grad(out, operands[2:], g)
    assert torch.allclose((out * g).sum(), (operands[2] * grad_value).sum())


def test_autocast_casts_operands() -> None:
    case = make_case((5, 9))
    mixed = (case.query.detach().bfloat16(), case.key, case.value.detach().half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse, _ = varlen_attn(*mixed, *case.operands[3:])
        double = varlen_attn(*(x.detach().double() for x in case.operands[:3]), *case.operands[3:])[0]
    assert (out.dtype, lse.dtype, double.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    assert_close(out, reference(case)[0], torch.bfloat16, "out")
    assert torch.autograd.grad(out.sum(), case.key)[0].dtype == torch.float32


def test_fakes_have_no_data() -> None:
    case = make_case((5, 9), dims=(8, 4))
    operands = [x.detach().to("meta") if isinstance(x, Tensor) else x for x in case.operands]
    out, lse, rng_state = varlen_attn(*operands)
    assert (out.shape, lse.shape, rng_state.shape) == ((14, 2, 4), (2, 14), (0,))
    assert varlen_attn(*operands, dropout_p=0.1)[2].shape == (2,)


def test_second_derivative_is_refused() -> None:
    case = make_case((5,))
    (grad,) = torch.autograd.grad(run(case)[0].sum(), case.query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), case.query)


def test_choice_of_kernel_holds_for_the_backward() -> None:
    """The backward runs in another thread, which does not see what ``config.patch`` sets here."""
    case = make_case((5, 9), dropout_p=0.5, dtype=torch.float64)
    with varlen_inductor.config.patch(kernels="math"):
        out = run(case)[0]
    g = torch.randn_like(out)
    (grad_value,) = torch.autograd.grad(out, case.value, g)
    assert torch.allclose((out * g).sum(), (case.value * grad_value).sum())
