"""Every CUDA kernel that is installed, against the reference; one that cannot run a problem is skipped with its reason."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from attention_cases import (
    LENGTHS,
    WINDOWS,
    Case,
    assert_close,
    check_against_reference,
    check_backward_into,
    make_case,
    reference,
    run,
)
from varlen_inductor.ops.attention import split_arguments, varlen_attn_backward
from varlen_inductor.ops.backends import BACKENDS, flash4, kept
from varlen_inductor.ops.joined import varlen_attn_backward_joined
from varlen_inductor.ops.problem import Problem

KERNELS = {backend.name: backend for backend in BACKENDS if backend.name not in ("cpu", "math")}
every_kernel = pytest.mark.parametrize("kernels", KERNELS)
kernels_that_write_in_place = pytest.mark.parametrize(
    "kernels", [name for name, backend in KERNELS.items() if backend.backward_into is not None]
)


def check(kernels: str, *lengths: Any, lse_gradient: bool = True, **options: Any) -> None:
    check_against_reference(supported(kernels, *lengths, **options), lse_gradient=lse_gradient)


def supported(kernels: str, *lengths: Any, **options: Any) -> Case:
    """A case that these kernels run."""
    case = make_case(*lengths, kernels=kernels, device="cuda", **options)
    layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
    reason = KERNELS[kernels].supports(Problem.of(*case.operands[:3], layout, rule))
    if reason is not None:
        pytest.skip(reason)
    return case


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(lengths: str, window: str, dtype: torch.dtype, kernels: str) -> None:
    check(kernels, *LENGTHS[lengths], heads=(4, 2), dims=(64, 64), window=WINDOWS[window], dtype=dtype, tail=5)


@every_kernel
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("lengths", [((130, 70), None), ((7, 200), (300, 0)), ((300, 3), (20, 150))], ids=str)
def test_what_is_behind_the_last_sequence(lengths: Any, window: str, fill: float, kernels: str) -> None:
    """More rows of it than a block has, also where the last sequence has no keys. It shows nowhere and stays as it is."""
    options = {"dims": (64, 64), "window": WINDOWS[window], "dtype": torch.bfloat16, "tail": 300, "fill": fill}
    for heads in ((4, 2), (6, 2)):
        case = supported(kernels, *lengths, heads=heads, **options)
        held = [x.detach().clone() for x in case.operands[:3]]
        check_against_reference(case, lse_gradient=False)
        for x, old in zip(case.operands[:3], held):
            assert torch.equal(x.detach().view(torch.int16), old.view(torch.int16))


@pytest.mark.parametrize("little_work", [0, math.inf], ids=["hidden", "repaired"])
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_flash4_behind_the_last_sequence(
    dims: tuple[int, int], window: str, little_work: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways in which a forward keeps it harmless; twice each, for launches differ from the second on."""
    monkeypatch.setattr(flash4, "LITTLE_WORK", little_work)
    for lengths, tail in (((300, 70, 1, 0, 5), 300), ((130,), 1), ((1,) * 40, 20), ((700, 300), 0), ((0, 200, 0), 2)):
        for fill in (math.nan, -math.inf, 1.0):
            options = {"window": WINDOWS[window], "dtype": torch.bfloat16, "tail": tail, "fill": fill}
            case = supported("flash4", lengths, None, heads=(6, 2), dims=dims, **options)
            expected, expected_lse = reference(case)
            for _ in range(2):
                out, lse, _ = run(case)
                assert_close(out, expected, torch.bfloat16, "out")
                assert_close(lse, expected_lse, torch.bfloat16, "lse")


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("sequences", [1, 2, 9, 256, 257])
def test_flash4_takes_the_longest_first(
    sequences: int, window: str, dim: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit what it gives in the order of the batch: each block of queries is computed as ever."""
    draw = random.Random(sequences)
    apart = [[draw.choice([0, 1, 64, 130, draw.randrange(900)]) for _ in range(sequences - 1)] + [300] for _ in range(2)]
    monkeypatch.setattr(flash4, "LITTLE_WORK", 0)
    orders: list[Any] = []
    attend = flash4._run

    def noted(way: str, tensors: Any, sizes: Any, layout: Any, rule: Any, order: Any = None) -> None:
        orders.append(order)
        attend(way, tensors, sizes, layout, rule, order)

    monkeypatch.setattr(flash4, "_run", noted)
    for lengths, lengths_k in ((apart[0], apart[0]), apart):
        options = {"heads": heads, "dims": (dim, dim), "window": WINDOWS[window], "dtype": torch.bfloat16, "tail": 5}
        case = supported("flash4", tuple(lengths), tuple(lengths_k), **options)
        if lengths is lengths_k:
            case = case._replace(cu_seq_k=case.cu_seq_q)
        ordered = run(case)
        with monkeypatch.context() as patch:
            patch.setattr(flash4, "_in_any_order", lambda device: False)
            expected = run(case)
        assert all(map(torch.equal, ordered, expected))
        given = sequences <= 256 and torch.cuda.get_device_capability()[0] == 9
        assert [order is not None for order in orders] == [given, False]
        orders.clear()


@every_kernel
@pytest.mark.parametrize("dims", [(16, 16), (32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (64, 128)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
def test_heads_and_dims(heads: tuple[int, int], dims: tuple[int, int], kernels: str) -> None:
    check(kernels, (130, 1, 517, 64), heads=heads, dims=dims, window=(-1, 0), dtype=torch.bfloat16, lse_gradient=False)


@every_kernel
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
def test_long_sequences(window: str, dims: tuple[int, int], kernels: str) -> None:
    """Some kernels cut them into other blocks than short ones."""
    check(kernels, (130, 1, 1300, 64), heads=(4, 2), dims=dims, window=WINDOWS[window], dtype=torch.bfloat16, tail=3)


@every_kernel
@pytest.mark.parametrize("window", ["full", "causal"])
def test_more_than_64k_tokens(window: str, kernels: str) -> None:
    """Many short sequences: more rows than 16 bits count, and more sequences than some kernels sort."""
    check(kernels, (220, 3) * 300, heads=(2, 1), dims=(64, 64), window=WINDOWS[window], dtype=torch.bfloat16)


@kernels_that_write_in_place
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_in_memory_that_is_there(lengths: str, window: str, kernels: str) -> None:
    for heads in ((4, 4), (4, 2)):
        case = supported(
            kernels, *LENGTHS[lengths], heads=heads, dims=(64, 64), window=WINDOWS[window], dtype=torch.bfloat16, tail=5
        )
        check_backward_into(case, KERNELS[kernels])


@kernels_that_write_in_place
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (96, 96), (128, 128), (160, 160), (256, 256), (64, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1), (1, 1)], ids=str)
def test_dims_of_gradients_in_memory_that_is_there(heads: tuple[int, int], dims: tuple[int, int], kernels: str) -> None:
    """Several calls with one bound of the lengths: the later ones go past the Python of some packages."""
    for lengths in ((130, 1, 517, 64), (517, 0, 3), (2, 517, 181)):
        for scale in (0.2, -0.2):
            case = supported(kernels, lengths, heads=heads, dims=dims, window=(-1, 0), dtype=torch.bfloat16, tail=3, scale=scale)
            check_backward_into(case, KERNELS[kernels])


@kernels_that_write_in_place
def test_many_gradients_in_memory_that_is_there(kernels: str) -> None:
    for heads in ((2, 2), (2, 1)):
        case = supported(kernels, (220, 3) * 300, heads=heads, dims=(64, 64), window=(-1, 0), dtype=torch.bfloat16, tail=1000)
        check_backward_into(case, KERNELS[kernels])


@every_kernel
@pytest.mark.parametrize("tails_unread", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_joined_gradients(heads: tuple[int, int], tails_unread: bool, kernels: str) -> None:
    options = {"fill": 0.0, "tails_unread": True} if tails_unread else {}
    for lengths in ((130, 1, 517, 64), (517, 0, 3)):
        case = supported(kernels, lengths, heads=heads, dims=(64, 64), window=(-1, 0), dtype=torch.bfloat16, tail=3, **options)
        out, lse, rng_state = (x.detach() for x in run(case))
        operands = [x.detach() if isinstance(x, torch.Tensor) else x for x in case.operands]
        given = (torch.randn_like(out), None, out, lse, rng_state, *operands)
        rows = sum(lengths) if tails_unread else sum(lengths) + 3
        expected = torch.cat([x.flatten(1) for x in varlen_attn_backward(*given, **case.options)], 1)
        actual = varlen_attn_backward_joined(*given, **case.options)
        assert actual.is_contiguous()
        assert_close(actual[:rows], expected[:rows], torch.bfloat16, "joined gradients", factor=2.0)


# --- the first result alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cudnn", "flash4", "triton"])
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("stays", [False, True])
def test_the_first_result_alone(stays: bool, heads: tuple[int, int], window: str, backend: str) -> None:
    """Bit by bit that of a forward; with offsets that stay as they are, calls of cuDNN share memory."""
    kernels = KERNELS[backend]
    sizes = {"heads": heads, "dims": (64, 64), "window": WINDOWS[window], "dtype": torch.bfloat16, "device": "cuda"}
    assert kernels.forward_drawn is not None
    for lengths in ((130, 1, 517, 64), (0, 300, 0), (2000,), (3,) * 300):
        case = make_case(lengths, tail=5, fill=0.0, tails_unread=True, **sizes)
        layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
        layout = layout._replace(cu_seq_k=layout.cu_seq_q)
        operands = [x.detach() for x in case.operands[:3]]
        reason = kernels.supports(Problem.of(*operands, layout, rule))
        if reason is not None:
            pytest.skip(reason)
        if stays:
            kept.never_written(layout.cu_seq_q)
        layers = [[torch.randn_like(x) for x in operands] for _ in range(4)]
        found = [kernels.forward_drawn(*layer, layout, rule, False)[0] for layer in layers]
        for layer, out in zip(layers, found, strict=True):
            expected = kernels.forward(*layer, layout, rule)[0]
            assert torch.equal(out[: sum(lengths)], expected[: sum(lengths)])


# --- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cudnn", "triton"])
@pytest.mark.parametrize("by_row", [False, True])
def test_any_two_numbers_are_seeds(by_row: bool, backend: str) -> None:
    """Each pair drops its own weights, as many as it should and the same in the backward, whatever bits the numbers have."""
    kernels = KERNELS[backend]
    if by_row and not kernels.lse_by_row:
        pytest.skip("it writes lse in one way")
    sizes = {"heads": (4, 4), "dims": (64, 64), "dtype": torch.bfloat16, "device": "cuda"}
    case = make_case((300, 1, 517, 64), fill=0.0, tails_unread=True, dropout_p=0.25, **sizes)
    layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
    layout = layout._replace(cu_seq_k=layout.cu_seq_q, lse_by_row=by_row)
    query, key, value = [x.detach() for x in case.operands[:3]]
    reason = kernels.supports(Problem.of(query, key, value, layout, rule))
    if reason is not None:
        pytest.skip(reason)
    most, least = 2**63 - 1, -(2**63)
    numbers = [(0, 0), (0, 1), (1, 0), (-1, -1), (most, most), (least, least), (most, 3), (3, most), (least, 5), (5, least)]
    numbers += [tuple(torch.randint(least, most, (2,)).tolist()) for _ in range(4)]
    seen = []
    for pair in numbers:
        memory = torch.tensor([7, *pair], device="cuda")
        for seeds, seeds_at in ((memory[1:], 0), (memory[1:].clone(), 0), (memory, 1)):  # 8 bytes further, too
            given = layout._replace(seeds=seeds, seeds_at=seeds_at)
            out, lse = kernels.forward_drawn(query, key, value, given, rule, True)
            grad = torch.randn_like(out)
            _, _, grad_value = kernels.backward(grad, None, out, lse, seeds, query, key, value, given, rule)
            difference = (out.double() * grad.double()).sum() - (grad_value.double() * value.double()).sum()
            assert difference.abs() < 0.03 * (out.double() * grad.double()).norm()
            kept = kernels.forward_drawn(query * 0, key, torch.ones_like(value), given, rule, False)[0].float()
            assert abs(float(kept.mean()) - 1.0) < 0.02
            seen.append(kept)
        assert torch.equal(seen.pop(), seen[-1])
        assert torch.equal(seen.pop(), seen[-1])
    assert not any(torch.equal(one, other) for i, one in enumerate(seen) for other in seen[:i])


# --- cuDNN: lse as it writes it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("stays", [False, True])
def test_cudnn_leaves_lse_as_it_writes_it(stays: bool, heads: tuple[int, int], window: str, dropout_p: float) -> None:
    """The same numbers in another order; its backward reads either, and layers that share offsets do not disturb each other."""
    backend = KERNELS["cudnn"]
    sizes = {"heads": heads, "dims": (64, 64), "window": WINDOWS[window], "dtype": torch.bfloat16, "device": "cuda"}
    for lengths in ((130, 1, 517, 64), (0, 300, 0), (2000,), (3,) * 300):
        case = make_case(lengths, tail=5, fill=0.0, tails_unread=True, dropout_p=dropout_p, **sizes)
        layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
        layout = layout._replace(cu_seq_k=layout.cu_seq_q)
        layers = [[torch.randn_like(x.detach()) for x in case.operands[:3]] for _ in range(3)]
        reason = backend.supports(Problem.of(*layers[0], layout, rule))
        if reason is not None:
            pytest.skip(reason)
        if stays:
            kept.never_written(layout.cu_seq_q)
        rows = slice(0, sum(lengths))
        found = [backend.forward(*layer, layout._replace(lse_by_row=True), rule) for layer in layers]
        grads = [torch.randn_like(out) for out, _, _ in found]
        by_row = [
            backend.backward(grad, None, out, lse, rng_state, *layer, layout._replace(lse_by_row=True), rule)
            for grad, (out, lse, rng_state), layer in zip(grads, found, layers, strict=True)
        ]
        for layer, (out, lse, rng_state), grad, actual in zip(layers, found, grads, by_row, strict=True):
            assert lse.is_contiguous()
            assert lse.shape[1] == heads[0]
            if dropout_p == 0.0:
                expected = backend.forward(*layer, layout, rule)
                assert torch.equal(out[rows], expected[0][rows])
                assert torch.equal(lse[rows].t(), expected[1][:, rows])
            wanted = backend.backward(grad, None, out, lse.t().contiguous(), rng_state, *layer, layout, rule)
            for one, other in zip(actual, wanted, strict=True):
                assert_close(one[rows], other[rows], torch.bfloat16, "gradient")


# --- cuDNN: gradients into one tensor for query, key and value -------------------------------------------------------


@pytest.mark.parametrize("tails_unread", [False, True])
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("lengths", ["ragged", "more keys", "more queries", "no keys", "no queries"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_cudnn_writes_gradients_into_a_projection(heads: tuple[int, int], lengths: str, window: str, tails_unread: bool) -> None:
    """The same as by themselves, with nothing written between them; twice, for launches differ from the second on."""
    backend = KERNELS["cudnn"]
    sizes = {"heads": heads, "dims": (64, 64), "window": WINDOWS[window], "dtype": torch.bfloat16, "device": "cuda"}
    case = make_case(*LENGTHS[lengths], tail=5, fill=0.0, tails_unread=tails_unread, **sizes)
    layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
    operands = [x.detach() for x in case.operands[:3]]
    reason = backend.supports(Problem.of(*operands, layout, rule))
    if reason is not None:
        pytest.skip(reason)
    assert backend.backward_into is not None
    for _ in range(2):
        out, lse, rng_state = backend.forward(*operands, layout, rule)
        given = (torch.randn_like(out), out, lse, rng_state, *operands, layout, rule)
        expected = backend.backward(given[0], None, *given[1:])
        memories = [torch.full((x.shape[0], x.shape[1] + 2, 64), 7.0, dtype=x.dtype, device="cuda") for x in operands]
        grads = tuple(memory[:, 1:-1] for memory in memories)
        backend.backward_into(grads, *given)
        tokens_q, tokens_k = case.tokens()
        for memory, grad, want, tokens in zip(memories, grads, expected, (tokens_q, tokens_k, tokens_k), strict=True):
            rows = slice(0, tokens) if tails_unread else slice(None)
            assert torch.allclose(grad[rows].float(), want[rows].float(), rtol=1e-2, atol=1e-2)
            assert memory[:, 0].eq(7.0).all()
            assert memory[:, -1].eq(7.0).all()
