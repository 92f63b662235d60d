"""What is put around the kernels of flash-attn-4, on the CPU: a stand-in takes the place of the package."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from flash4_stand_in import FlashAttn4
from test_tails import few_programs

from attention_cases import LENGTHS, WINDOWS, check_against_reference, check_backward_into, make_case, run
from triton_interpreter import interpret, needs_interpreter
from varlen_inductor.ops import backends
from varlen_inductor.ops.attention import split_arguments
from varlen_inductor.ops.backends import flash4, rows, tails, triton_kernel
from varlen_inductor.ops.backends.packages import load
from varlen_inductor.ops.backends.replay import Note, Replay
from varlen_inductor.ops.problem import Problem

PROBLEM = Problem(torch.device("cuda", 0), torch.bfloat16, 4, 4, 64, 64)


def forget() -> None:
    for cached in (load, flash4._kernels, flash4._unavailable, flash4._max_head_dim, flash4._in_any_order, backends.choose):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashAttn4]:
    package = FlashAttn4()
    monkeypatch.setitem(sys.modules, flash4.MODULE, package.module)
    monkeypatch.setattr(backends, "BACKENDS", (dataclasses.replace(flash4.BACKEND, supports=lambda problem: None),))
    forget()
    yield package
    forget()


def notes() -> list[Any]:
    kernels = flash4._kernels()
    assert not isinstance(kernels, str)
    return list(kernels.replay.notes.values())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_and_windows(lengths: str, window: str) -> None:
    case = make_case(*LENGTHS[lengths], heads=(4, 2), window=WINDOWS[window], tail=3)
    check_against_reference(case)
    check_against_reference(make_case(*LENGTHS[lengths], heads=(2, 2), window=WINDOWS[window], tail=1), lse_gradient=False)


@pytest.mark.parametrize("dims", [(32, 32), (64, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_head_dims(dims: tuple[int, int], heads: tuple[int, int]) -> None:
    for lengths in ((5, 7), (9, 3, 1)):
        check_against_reference(make_case(lengths, heads=heads, window=(-1, 0), dims=dims)._replace(max_q=9, max_k=9))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_the_kernels_do_not_take(scale: float) -> None:
    check_against_reference(make_case((5, 7), window=(-1, 0), scale=scale))


@pytest.mark.parametrize("dims", [(32, 32), (64, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_gradients_in_memory_that_is_there(dims: tuple[int, int], heads: tuple[int, int]) -> None:
    """What the kernels cannot write (padded head dims, a gradient with the wrong sign) is copied to it."""
    for scale in (0.3, -0.5, 0.0):
        for unread in (False, True):
            case = make_case((5, 0, 70), heads=heads, dims=dims, window=(-1, 0), tail=3, fill=0.0, scale=scale, tails_unread=unread)
            check_backward_into(case, flash4.BACKEND)
    check_backward_into(make_case((3, 1, 4), (9, 0, 4), heads=heads, dims=dims), flash4.BACKEND)


def test_later_calls_write_to_the_memory_of_the_call(package: FlashAttn4) -> None:
    """One note for contiguous gradients and for columns of a tensor: the compiled kernels take both."""
    for heads in ((2, 2), (4, 2)):
        for lengths in ((70, 9), (3, 1, 8), (70, 30, 5, 5)):
            case = make_case(lengths, heads=heads, dims=(32, 32), window=(-1, 0), tail=4)._replace(max_q=70, max_k=70)
            check_backward_into(case, flash4.BACKEND)
    assert package.calls["backward"] == 2
    assert package.calls["kernel bwd"] == 12
    assert all(isinstance(note, Note) for note in notes())


def test_joined_gradients(package: FlashAttn4) -> None:
    """The kernels write to the one tensor, and a call is noted as any other."""
    for lengths in ((70, 9), (3, 1, 8)):
        case = make_case(lengths, heads=(4, 2), dims=(32, 32), window=(-1, 0))._replace(max_q=70, max_k=70)
        operands = [x.detach() if isinstance(x, torch.Tensor) else x for x in case.operands]
        results = [x.detach() for x in run(case)]
        grad_out = torch.randn_like(results[0])
        expected = torch.ops.varlen_inductor.varlen_attn_backward(grad_out, None, *results, *operands, **case.options)
        for _ in range(2):
            actual = torch.ops.varlen_inductor.varlen_attn_backward_joined(grad_out, None, *results, *operands, **case.options)
            assert torch.equal(actual, torch.cat([x.flatten(1) for x in expected], 1))
    assert package.calls["backward"] == 1
    assert package.calls["kernel bwd"] == 6


def check_what_the_caller_holds(many: int) -> None:
    """Also behind the last sequence, where it is hidden from the kernels; and nothing of it shows in a result."""
    for heads in ((2, 2), (4, 2)):
        for tail in (3, many):
            case = make_case((5, 7), heads=heads, tail=tail)
            g = torch.randn(12 + tail, heads[0], 8).index_fill_(0, torch.arange(12, 12 + tail), torch.inf)
            held = [x.detach().clone() for x in (*case.operands[:5], g)]
            for _ in range(2):
                out, _, _ = run(case)
                assert (out[12:] == 0).all()
                assert all(x.isfinite().all() for x in torch.autograd.grad(out, case.operands[:3], g))
                for x, old in zip((*case.operands[:5], g), held):
                    assert torch.equal(x.detach().view(torch.int8), old.view(torch.int8))


def test_what_the_caller_holds_is_left_alone() -> None:
    check_what_the_caller_holds(300)


def check_what_a_forward_is_given() -> None:
    """Behind the last sequence: query and key as they are, which do no harm, but only finite numbers in value."""
    run_kernel, given = flash4._run, []

    def noted(way: str, tensors: tuple[torch.Tensor, ...], *rest: Any) -> None:
        given.append([x.clone() for x in tensors[:3]])
        run_kernel(way, tensors, *rest)

    case = make_case((5, 7), (4, 0), heads=(4, 2), tail=3)
    layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
    query, key, value = (x.detach() for x in case.operands[:3])
    held = [x.clone() for x in (query, key, value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash4, "_run", noted)
        for _ in range(2):
            out, lse, _ = flash4.forward(query, key, value, layout, rule)
            for x, old in zip((query, key, value), held):
                assert torch.equal(x.view(torch.int8), old.view(torch.int8))
            assert (out[:5] != 0).all()
            assert (out[5:] == 0).all()
            assert lse[:, :5].isfinite().all()
            assert (lse[:, 5:] == -torch.inf).all()
    for q, k, v in given:
        assert q[12:].isnan().all()
        assert k[4:].isnan().all()
        assert torch.equal(v, held[2].nan_to_num(0.0))
    assert len(given) == 2


def test_what_a_forward_is_given() -> None:
    check_what_a_forward_is_given()


def check_what_fails() -> None:
    """What the caller holds is as it was also where a kernel raises; with gradients that must be copied, and with others."""

    def fails(**options: Any) -> None:
        raise ValueError("a kernel")

    broken = flash4.Kernels(fails, fails, Replay(()), False)
    for scale in (0.3, -0.3):
        case = make_case((5, 7), tail=3, scale=scale)
        layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
        operands = [x.detach() for x in case.operands[:3]]
        results = [x.detach() for x in run(case)]
        g = torch.full_like(results[0], torch.nan)
        held = [x.clone() for x in (*operands, g)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flash4, "_kernels", lambda: broken)
            with pytest.raises(ValueError, match="a kernel"):
                flash4.forward(operands[0], operands[1], operands[2], layout, rule)
            with pytest.raises(ValueError, match="a kernel"):
                flash4.backward(g, None, results[0], results[1], results[2], operands[0], operands[1], operands[2], layout, rule)
        for x, old in zip((*operands, g), held):
            assert torch.equal(x.view(torch.int8), old.view(torch.int8))


def test_what_fails() -> None:
    check_what_fails()


@contextmanager
def calls_of_the_forward() -> Iterator[tuple[FlashAttn4, list[Any], pytest.MonkeyPatch]]:
    """A package that was never called, what its forward is given by name, and how to go on patching. Sequences have an order."""
    package = FlashAttn4()
    call, given = flash4._call, []

    def noted(kernels: Any, way: str, tensors: Any, cu_q: Any, cu_k: Any, *rest: Any) -> None:
        if way == "forward":
            given.append((cu_q, rest[-1].get("seqused_q"), cu_k, rest[-1].get("seqused_k")))
        call(kernels, way, tensors, cu_q, cu_k, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, flash4.MODULE, package.module)
        forget()
        patch.setattr(flash4, "_call", noted)
        patch.setattr(flash4, "_in_any_order", lambda device: True)
        yield package, given, patch
    forget()


def check_one(lengths: Any, lengths_k: Any = None, window: tuple[int, int] = (-1, 0), **options: Any) -> None:
    """With one tensor of offsets where there are no lengths of keys."""
    case = make_case(lengths, lengths_k, heads=(4, 2), window=window, tail=3)._replace(**options)
    check_against_reference(case if lengths_k else case._replace(cu_seq_k=case.cu_seq_q))


def check_the_longest_first() -> None:
    """Each sequence's start and length, the longest first, where the kernels take both; rows stay where they are."""
    with calls_of_the_forward() as (package, given, _):
        check_one((5, 0, 70, 7))
        check_one((3, 9, 2), (4, 0, 130))
        check_one((5, 8, 6), (9, 9, 1))
        check_one((6,))
    found = [tuple(x.tolist() for x in some) for some in given]
    assert found == [
        ([5, 75, 0, 5, 82], [70, 7, 5, 0], [5, 75, 0, 5, 82], [70, 7, 5, 0]),
        ([12, 0, 3, 14], [2, 3, 9], [4, 0, 4, 134], [130, 4, 0]),
        ([0, 5, 13, 19], [5, 8, 6], [0, 9, 18, 19], [9, 9, 1]),
        ([0, 6], [6], [0, 6], [6]),
    ]
    assert package.calls["kernel fwd"] == len(given)


def check_orders_in_turn() -> None:
    """Calls that differ in lengths, in whether queries and keys have one tensor of offsets, and in whether there is an order."""
    with calls_of_the_forward() as (package, given, patch):
        for i, ordered in enumerate([True, False, True, False]):
            patch.setattr(flash4, "_in_any_order", lambda device, ordered=ordered: ordered)
            for lengths, lengths_k in (((70,), None), ((5, 70), None), ((5, 70), (70, 5)), ((70, 3, 9), None), ((70,), (70,))):
                check_one(lengths, lengths_k, max_q=70, max_k=70)
            check_one((5, 9, 60), (60, 9, 5), max_q=70, max_k=70)
            assert len(given) == min(2 * i + 2, 4)
        assert package.calls["kernel fwd"] == 24
        assert len([x for _, x, *_ in given if x is None]) == 2
        assert all(isinstance(note, Note) for note in notes())


def check_repairs() -> None:
    """Short forwards: nothing in front, and behind them what `test_repair` tests; against the reference, NaN behind the end."""
    blocks = triton_kernel.Blocks(16, 16, 4, 1)
    triton_kernel.OTHER.update(dict.fromkeys(triton_kernel.OTHER, triton_kernel.Tiles(blocks, blocks, blocks)))
    with calls_of_the_forward() as (_, given, patch):
        patch.setattr(flash4, "_repairable", lambda device: True)
        for lengths, lengths_k in (((5, 0, 70, 7), None), ((3, 9, 2), (4, 0, 130)), ((6,), None)):
            check_one(lengths, lengths_k)
        assert [used for _, used, *_ in given] == [None] * len(given)
        test_strided_operands()
        torch.use_deterministic_algorithms(True)
        check_one((5, 8, 6), (9, 9, 1))
        torch.use_deterministic_algorithms(False)
        assert given[-1][1] is not None, "values are hidden, and there is an order"


def test_offsets_are_copied_before_a_repaired_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What repairs starts while what is in front of it ends, so that must be the attention."""
    done: list[str] = []
    run_, contiguous = flash4._run, flash4.contiguous
    monkeypatch.setattr(flash4, "_repairable", lambda device: True)
    monkeypatch.setattr(flash4, "_run", lambda *args: (done.append("attention"), run_(*args)))
    monkeypatch.setattr(flash4, "contiguous", lambda layout: (done.append("copy"), contiguous(layout))[1])

    def repair(out: Any, lse: Any, query: Any, key: Any, value: Any, layout: Any, rule: Any) -> None:
        assert layout.cu_seq_q.is_contiguous() and layout.cu_seq_k.is_contiguous()
        done.append("repair")

    monkeypatch.setattr(triton_kernel, "repair_forward", repair)
    case = make_case((5, 7), tail=2)
    offsets = torch.stack([case.cu_seq_q, case.cu_seq_q], 1)[:, 0]
    run(case._replace(cu_seq_q=offsets, cu_seq_k=offsets))
    assert done == ["copy", "attention", "repair"]


@pytest.mark.parametrize(
    ("lengths", "window", "expected"),
    [
        ((100,) * 4, (-1, -1), 400 * 100),
        ((100, 50, 10), (-1, -1), 160 * (160 / 3 + 100) / 2),
        ((100,) * 4, (-1, 0), 400 * 100 / 2),
        ((100,) * 4, (10, 9), 400 * 20),
        ((100,) * 4, (200, 9), 400 * 100),
    ],
)
def test_work(lengths: tuple[int, ...], window: tuple[int, int], expected: float) -> None:
    case = make_case(lengths, heads=(4, 2), dims=(8, 16), window=window)
    layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
    rows = sum(lengths)
    assert flash4._work((rows, 4, 8, rows, 2, 16), layout, rule) == pytest.approx(2 * 4 * (8 + 16) * expected)


def check_kernels() -> None:
    """The same with the Triton kernels around: rows are hidden in place, and put back by what finishes the results."""
    tails._with_triton = rows._with_triton = lambda x: True
    few_programs()
    rows._GRID = (4, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, flash4.MODULE, FlashAttn4().module)
        patch.setattr(backends, "BACKENDS", (dataclasses.replace(flash4.BACKEND, supports=lambda problem: None),))
        forget()
        check_what_the_caller_holds(20)
        check_what_a_forward_is_given()
        test_strided_operands()
        check_what_fails()
        check_the_longest_first()
        check_orders_in_turn()
        check_repairs()
        for dims in ((32, 32), (32, 64)):
            for scale in (0.3, -0.5):
                case = make_case((5, 0, 70), heads=(4, 2), dims=dims, window=(-1, 0), tail=3, scale=scale)
                check_backward_into(case, flash4.BACKEND)
                check_against_reference(case)


@needs_interpreter
def test_kernels() -> None:
    interpret("ops/backends/test_flash4", "check_kernels")


def test_the_first_result_alone() -> None:
    case = make_case((5, 0, 70), heads=(4, 2), window=(-1, 0), tail=3)
    layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
    operands = [x.detach() for x in case.operands[:3]]
    for scale in (rule.scale, -0.5):
        given = (*operands, layout, rule._replace(scale=scale))
        assert torch.equal(flash4.forward_drawn(*given, False)[0], flash4.forward(*given)[0])


def test_strided_operands() -> None:
    case = make_case((5, 7), tail=2)
    qkv = torch.stack([x.detach() for x in case.operands[:3]], 1)
    query, key, value = (x.requires_grad_() for x in qkv.unbind(1))
    offsets = torch.stack([case.cu_seq_q, case.cu_seq_q], 1)[:, 0]
    check_against_reference(case._replace(query=query, key=key, value=value, cu_seq_q=offsets))
    columns = [torch.stack([x.detach(), x.detach()], -1)[..., 0].requires_grad_() for x in case.operands[:3]]
    check_against_reference(case._replace(query=columns[0], key=columns[1], value=columns[2]))
    one = case.key[:1].detach().expand(12, 2, 8).requires_grad_()
    check_against_reference(make_case((5, 7))._replace(key=one))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_later_calls_go_past_the_functions(package: FlashAttn4, heads: tuple[int, int]) -> None:
    """Other numbers of tokens and of sequences: the same kernels, compiled once."""
    lengths: list[Any] = [(70, 9), (3, 1, 8), (70, 30, 5, 5), (1,), (64, 64)]
    for i, some in enumerate(lengths):
        check_against_reference(make_case(some, heads=heads, window=(-1, 0), tail=4)._replace(max_q=70, max_k=70))
        assert package.calls["forward"] == package.calls["backward"] == 1
        assert package.calls["kernel fwd"] == package.calls["kernel bwd"] == i + 1
    assert package.compiled == (5 if heads[0] > heads[1] else 4)  # the gradients of shared keys are converted at the end, too
    assert all(isinstance(note, Note) for note in notes())


def test_one_length_of_queries_and_another_of_keys(package: FlashAttn4) -> None:
    for lengths in (((70, 9), (300, 400)), ((3, 1, 8), (330, 20, 88)), ((9, 9), (9, 9))):
        check_against_reference(make_case(*lengths, heads=(4, 2))._replace(max_q=70, max_k=400))
    assert package.calls["backward"] == 2  # with as many queries as keys, rows say less about what memory is for


def test_what_is_not_understood_is_not_replayed(package: FlashAttn4, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for i in range(5):
        check_against_reference(make_case((7, 9)))
        assert package.calls["backward"] == i + 1  # its counters are memory that is no scratch memory we know
    assert package.calls["forward"] == 1


def test_operands_that_are_one(package: FlashAttn4) -> None:
    """Nothing is noted: which of the two an argument is cannot be told."""
    case = make_case((5, 7))
    one = case._replace(value=case.key, options=case.options | {"tails_unread": True})  # makes no copies
    for i in range(2):
        run(one)
        assert package.calls["forward"] == i + 1
    check_against_reference(case)
    assert package.calls["forward"] == 3
    check_against_reference(case)
    assert package.calls["forward"] == 3


def test_a_replay_that_fails(package: FlashAttn4) -> None:
    case = make_case((5, 7))
    check_against_reference(case)
    for note in notes():
        broken = note.steps[0]._replace(kernel=None)
        kernels = flash4._kernels()
        assert not isinstance(kernels, str)
        for key, kept in kernels.replay.notes.items():
            if kept is note:
                kernels.replay.notes[key] = note._replace(steps=(broken, *note.steps[1:]))
    for _ in range(2):
        check_against_reference(case)
    assert package.calls["forward"] == package.calls["backward"] == 3
    assert isinstance(package.forward.compile_cache.cache, dict)


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash4, "MAX_ELEMENTS", 100)
    with pytest.raises(RuntimeError, match=r"2\*\*31 elements or more: split the batch"):
        run(make_case((5, 7)))


def on(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
    forget()


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, 9, 0)
    supports = flash4.supports
    assert supports(PROBLEM) is None
    assert supports(PROBLEM._replace(head_dim=256, head_dim_v=96, window_left=3)) is None
    shared = PROBLEM._replace(num_heads_k=2, head_dim_v=128)
    assert supports(shared) is None
    assert supports(shared._replace(head_dim=192)) == (
        "its backward shares heads only if key and value have one head dim, not 192 and 128"
    )
    assert supports(shared._replace(head_dim=192, num_heads_k=4)) is None
    assert supports(PROBLEM._replace(head_dim=72)) == "its head dims are multiples of 32, not 72 and 64"
    assert supports(PROBLEM._replace(head_dim_v=40)) == "its head dims are multiples of 32, not 64 and 40"
    assert supports(PROBLEM._replace(seqused_k=True)) == "it reads past the keys in use (seqused_k)"
    assert supports(PROBLEM._replace(device=torch.device("cpu"))) == "it runs on CUDA only"
    assert supports(PROBLEM._replace(dtype=torch.float32)) == "it computes in float16 or bfloat16, not torch.float32"
    assert supports(PROBLEM._replace(head_dim_v=264)) == "its head dim is at most 256 here, not 264"
    assert supports(PROBLEM._replace(dropout_p=0.1)) == "it has no dropout"
    assert supports(PROBLEM._replace(positions=True)) is None
    assert supports(PROBLEM._replace(positions=True, window_right=0)) == "a window that speaks of positions is unknown to it"
    on(monkeypatch, 10, 0)
    assert supports(PROBLEM._replace(head_dim=256)) == "its head dim is at most 128 here, not 256"
    on(monkeypatch, 8, 6)
    assert supports(PROBLEM) == "it is used with compute capability 9 and 10, and this device has 8.6"


def test_which_forwards_are_given_an_order(monkeypatch: pytest.MonkeyPatch, package: FlashAttn4) -> None:
    """Those of Hopper that take starts and lengths apart. It is the device's own kernel that is asked about."""

    def in_any_order(*capability: int) -> bool:
        on(monkeypatch, *capability)
        return flash4._in_any_order(torch.device("cuda", 0))

    assert in_any_order(9, 0)
    assert not in_any_order(10, 0)
    forward = package.forward

    def without(*, seqused_k: Any = None, **options: Any) -> Any: ...

    without.__signature__ = inspect.signature(forward).replace(  # type: ignore[attr-defined]
        parameters=[p for p in inspect.signature(forward).parameters.values() if p.name != "seqused_q"]
    )
    monkeypatch.setattr(package.module, "_flash_attn_fwd", without)
    assert not in_any_order(9, 0)
    assert flash4.supports(PROBLEM) is None


def test_releases_that_are_not_understood(monkeypatch: pytest.MonkeyPatch, package: FlashAttn4) -> None:
    def reason() -> str | None:
        on(monkeypatch, 9, 0)
        return flash4.supports(PROBLEM)

    backward = package.module._flash_attn_bwd

    def old(q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any, softmax_scale: Any = None, causal: Any = False) -> None: ...

    monkeypatch.setattr(package.module, "_flash_attn_bwd", old)
    assert (reason() or "").startswith("_flash_attn_bwd of this release of flash-attn-4 does not take cu_seqlens_k,")
    names = ", ".join(sorted(flash4.BACKWARD))
    exec(f"def new({names}, secret): ...", scope := {})
    monkeypatch.setattr(package.module, "_flash_attn_bwd", scope["new"])
    assert reason() == "_flash_attn_bwd of this release of flash-attn-4 wants secret, which is not known here"
    monkeypatch.delattr(package.module, "_flash_attn_bwd")
    assert reason() == "this release of flash-attn-4 has no _flash_attn_bwd"
    monkeypatch.setattr(package.module, "_flash_attn_bwd", backward, raising=False)
    assert reason() is None
    monkeypatch.delitem(sys.modules, flash4.MODULE)
    assert reason() == "flash_attn.cute.interface is not installed (pip install --pre flash-attn-4)"


def test_a_module_that_is_there_already() -> None:
    assert isinstance(load(flash4.MODULE), ModuleType)
