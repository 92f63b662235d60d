"""What is put around cuDNN's kernels, on the CPU: a stand-in that reads and writes the same memory takes their place.

The kernels themselves are tested in tests/gpu.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch_stand_in import STREAM, Compiled
from torch import Tensor

from attention_cases import LENGTHS, WINDOWS, assert_close, check_against_reference, make_case, reference, run
from triton_interpreter import interpret, needs_interpreter
from varlen_inductor import _compat_operators
from varlen_inductor.ops import backends
from varlen_inductor.ops.attention import split_arguments
from varlen_inductor.ops.backends import cudnn, cudnn_plan, cudnn_rows, kept, launch
from varlen_inductor.ops.backends.cudnn_plan import OF_QUERIES, Key
from varlen_inductor.ops.packing import plan_in_place
from varlen_inductor.ops.problem import Layout, Problem, Rule


def memory(pointer: int, count: int, dtype: torch.dtype) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(pointer), dtype=dtype)


WORKSPACE = 100


class StandIn:
    """A plan whose ``run`` does as cuDNN does: it knows pointers, and the offset and lengths of each sequence."""

    _numbers = itertools.count()

    def __init__(self, key: Key) -> None:
        self.key, self.number = key, next(self._numbers)
        self.names = cudnn_plan.names_of(key)
        self.layouts = cudnn_plan.layouts_of(key)
        self.token_strides = tuple(self.layouts[name][1][2] for name in self.names)
        self.most_rows = 10**6
        self.scratch = cudnn_plan.scratch_of(key, self.token_strides, WORKSPACE)

    def run(self, index: int, stream: int, pointers: tuple[int, ...], workspace: int) -> None:
        key, count = self.key, len(self.names)
        assert (index, stream) == (-1, STREAM)
        memory(workspace, WORKSPACE, torch.uint8).fill_(255)
        assert len(pointers) == 2 * count + 2
        assert all(pointer % 16 == 0 for pointer in pointers)
        data, offsets = dict(zip(self.names, pointers)), dict(zip(self.names, pointers[count:]))
        queries, keys = (memory(pointer, key.sequences, torch.int32).tolist() for pointer in pointers[2 * count :])
        wide = torch.int64 if key.wide else torch.int32
        ends = {name: memory(offsets[name], key.sequences + 1, wide).tolist() for name in self.names}
        for i in range(key.sequences):
            assert 0 <= queries[i] <= key.max_q
            assert 0 <= keys[i] <= key.max_k
            assert (queries[i] == 0) == (keys[i] == 0), "cuDNN is not asked for sequences without queries or keys"
            if queries[i]:
                rows = {name: self._rows(name, data[name], ends[name][i], queries[i], keys[i]) for name in self.names}
                part = {name: x.float() for name, x in rows.items()}
                (self._backward if key.backward else self._forward)(part)
                for name in self.names:
                    rows[name].copy_(part[name])

    def _rows(self, name: str, pointer: int, start: int, queries: int, keys: int) -> Tensor:
        (_, heads, _, dim), (_, head, token, element) = self.layouts[name]
        count = queries if name in OF_QUERIES else keys
        assert element == 1
        last = start + (count - 1) * token + (heads - 1) * head + dim
        dtype = torch.float32 if name == "stats" else self.key.dtype
        return memory(pointer, last, dtype).as_strided((heads, count, dim), (head, token, 1), start)

    def _scores(self, part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        q, k, rule = part["q"], part["k"], self.key.rule
        k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
        distance = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None]
        if not self.key.square:
            distance = distance - (k.shape[1] - q.shape[1])
        seen = torch.ones_like(distance, dtype=torch.bool)
        if rule.window_left >= 0:
            seen = seen & (distance >= -rule.window_left)
        if rule.window_right >= 0:
            seen = seen & (distance <= rule.window_right)
        scores = (q @ k.mT) * rule.scale
        return torch.where(seen, scores, -math.inf), seen

    def _forward(self, part: dict[str, Tensor]) -> None:
        scores, _ = self._scores(part)
        if self.key.stats:
            part["stats"].copy_(scores.logsumexp(2, keepdim=True))
        value = part["v"].repeat_interleave(part["q"].shape[0] // part["v"].shape[0], 0)
        part["o"].copy_(scores.softmax(2) @ value)  # NaN where no key is seen

    def _backward(self, part: dict[str, Tensor]) -> None:
        scores, _ = self._scores(part)
        weights = (scores - part["stats"]).exp()
        assert weights.isfinite().all()
        groups = part["q"].shape[0] // part["k"].shape[0]
        key, value = (part[name].repeat_interleave(groups, 0) for name in ("k", "v"))
        delta = (part["g"] * part["o"]).sum(2, keepdim=True)
        grad_scores = weights * (part["g"] @ value.mT - delta) * self.key.rule.scale
        part["dq"].copy_(grad_scores @ key)
        part["dk"].copy_((grad_scores.mT @ part["q"]).unflatten(0, (-1, groups)).sum(1))
        part["dv"].copy_((weights.mT @ part["g"]).unflatten(0, (-1, groups)).sum(1))


def fresh_memory_is_nan() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cudnn, "plan_for", StandIn)
    monkeypatch.setattr(cudnn, "_known", {})
    monkeypatch.setattr(cudnn, "_ready", {})
    monkeypatch.setattr(_compat_operators, "current_device_index", lambda: -1)
    monkeypatch.setattr(_compat_operators, "current_stream_pointer", lambda index: STREAM)
    monkeypatch.setattr(backends, "BACKENDS", (dataclasses.replace(cudnn.BACKEND, supports=lambda problem: None),))
    backends.choose.cache_clear()
    fresh_memory_is_nan()
    yield
    torch.use_deterministic_algorithms(False)
    backends.choose.cache_clear()


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_and_windows(lengths: str, window: str) -> None:
    check_against_reference(make_case(*LENGTHS[lengths], heads=(4, 2), dims=(8, 16), window=WINDOWS[window], tail=3))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("lse_gradient", [True, False])
def test_scales(scale: float, lse_gradient: bool) -> None:
    check_against_reference(make_case((5, 7), window=(-1, 0), scale=scale), lse_gradient=lse_gradient)


@pytest.mark.usefixtures("on_the_cpu")
def test_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    key_of = cudnn.key_of
    monkeypatch.setattr(cudnn, "key_of", lambda *args: key_of(*args)._replace(wide=True))
    check_against_reference(make_case((5, 0, 7), (3, 2, 7), window=(-1, 0), tail=2))


@pytest.mark.usefixtures("on_the_cpu")
def test_used_keys_and_padding_in_place() -> None:
    used = torch.tensor([2, 0, 5], dtype=torch.int32)
    check_used(make_case((3, 2, 4), (6, 3, 9), seqused_k=used))
    mask = torch.arange(6) < torch.tensor([6, 1, 4])[:, None]
    _, _, ends, used = plan_in_place(mask)
    case = make_case((18,), seqused_k=used)
    check_used(case._replace(cu_seq_q=ends, cu_seq_k=ends, max_q=6, max_k=6))


def check_used(case) -> None:  # type: ignore[no-untyped-def]
    used, ends = case.options["seqused_k"].tolist(), case.cu_seq_k.tolist()
    alive = torch.zeros(case.key.shape[0], dtype=torch.bool)
    for start, count in zip(ends, used):
        alive[start : start + count] = True
    expected, expected_lse = reference(case)
    wanted = torch.autograd.grad(expected.sum(), case.operands[:3])
    with torch.no_grad():
        case.key[~alive] = case.value[~alive] = math.nan
    out, lse, _ = run(case)
    assert_close(out, expected, torch.float32, "out")
    assert_close(lse, expected_lse, torch.float32, "lse")
    for name, grad, want in zip("qkv", torch.autograd.grad(out.sum(), case.operands[:3]), wanted):
        assert_close(grad, want, torch.float32, name)


@pytest.mark.usefixtures("on_the_cpu")
def test_operands_as_the_kernels_read_them() -> None:
    strided = make_case((5, 7), dims=(8, 8))
    offsets = torch.stack([strided.cu_seq_q, strided.cu_seq_q], 1)[:, 0]
    projection = torch.randn(12, 3, 2, 8, requires_grad=True)
    query, key, value = projection.unbind(1)
    check_against_reference(strided._replace(query=query, key=key, value=value, cu_seq_q=offsets))
    odd = [torch.randn(12, 2, 9)[..., 1:].requires_grad_() for _ in range(3)]
    check_against_reference(strided._replace(query=odd[0], key=odd[1], value=odd[2]))
    out, _, _ = run(strided)
    (grad,) = torch.autograd.grad(out.sum(), strided.query)  # a gradient of strides 0
    (wanted,) = torch.autograd.grad(reference(strided)[0].sum(), strided.query)
    assert_close(grad, wanted, torch.float32, "gradient of query")


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("lengths", ["ragged", "more keys", "more queries", "no keys", "no queries"])
def test_gradients_into_tensors_that_are_there(lengths: str, scale: float) -> None:
    """Parts of one projection's gradient: equal to the gradients by themselves, and nothing else is written."""
    case = make_case(*LENGTHS[lengths], heads=(4, 2), dims=(8, 16), window=(-1, 0), tail=3, scale=scale)
    layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
    query, key, _ = operands = [x.detach() for x in case.operands[:3]]
    out, lse, rng_state = cudnn.forward(*operands, layout, rule)
    given = (torch.randn_like(out), out, lse, rng_state, *operands, layout, rule)
    expected = cudnn.backward(given[0], None, *given[1:])
    of_queries, of_keys = torch.full((query.shape[0], 48), 7.0), torch.full((key.shape[0], 64), 7.0)
    grads = (
        of_queries[:, 8:40].unflatten(1, (4, 8)),
        of_keys[:, :16].unflatten(1, (2, 8)),
        of_keys[:, 24:56].unflatten(1, (2, 16)),
    )
    assert cudnn.BACKEND.backward_into is not None
    cudnn.BACKEND.backward_into(grads, *given)
    for grad, want in zip(grads, expected):
        assert torch.equal(grad, want)
    for rest in (of_queries[:, :8], of_queries[:, 40:], of_keys[:, 16:24], of_keys[:, 56:]):
        assert rest.eq(7.0).all()


@pytest.mark.usefixtures("on_the_cpu")
def test_gradients_of_one_head_into_tensors_that_are_there() -> None:
    """PyTorch gives a dim of one any stride."""
    case = make_case((3, 4), heads=(1, 1))
    layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
    operands = [x.detach() for x in case.operands[:3]]
    out, lse, rng_state = cudnn.forward(*operands, layout, rule)
    given = (torch.randn_like(out), out, lse, rng_state, *operands, layout, rule)
    memory_of_all = torch.empty(3, 7, 8)
    grads = tuple(x.as_strided((7, 1, 8), (8, 1, 1), x.storage_offset()) for x in memory_of_all)
    cudnn.backward_into(grads, *given)
    for grad, want in zip(grads, cudnn.backward(given[0], None, *given[1:])):
        assert torch.equal(grad, want)


# --- the first result alone ------------------------------------------------------------------------------------------


def packed_operands(lengths: tuple[int, ...], **options: Any) -> tuple[list[Tensor], Layout, Rule]:
    """As a packed graph calls its kernels: one tensor of offsets for both sides, and rows behind them that nobody reads."""
    case = make_case(lengths, heads=(4, 2), dims=(8, 16), tail=3, fill=0.0, tails_unread=True, **options)
    layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
    return [x.detach() for x in case.operands[:3]], layout._replace(cu_seq_k=layout.cu_seq_q), rule


@pytest.fixture
def placed(on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The plans for which it was written down where sequences lie, and how many numbers of stats each had."""
    calls: list[tuple[int, int]] = []
    place = cudnn_rows.place

    def noted(plan: Any, layout: Layout, like: Tensor, stats: int, stream: int) -> Any:
        calls.append((plan.number, stats))
        return place(plan, layout, like, stats, STREAM)

    monkeypatch.setattr(cudnn_rows, "place", noted)
    monkeypatch.setattr(cudnn, "place", noted)
    return calls


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [(5, 1, 9), (0, 7, 0, 3), (4,)], ids=str)
def test_the_first_result_alone(lengths: tuple[int, ...], window: str) -> None:
    operands, layout, rule = packed_operands(lengths, window=WINDOWS[window])
    expected = cudnn.forward(*operands, layout, rule)[0]
    for offsets in (layout.cu_seq_q, layout.cu_seq_q.clone()):
        kept.never_written(offsets)
        for _ in range(2):
            out, _ = cudnn.forward_drawn(*operands, layout._replace(cu_seq_q=offsets, cu_seq_k=offsets), rule, False)
            assert torch.equal(out[: sum(lengths)], expected[: sum(lengths)])


def test_layers_share_where_sequences_lie(placed: list[tuple[int, int]]) -> None:
    operands, layout, rule = packed_operands((5, 1, 9))
    for _ in range(2):
        cudnn.forward_drawn(*operands, layout, rule, False)
    assert placed == [placed[0]] * 2, "these offsets may have changed"
    placed.clear()
    kept.never_written(layout.cu_seq_q)
    for _ in range(3):
        cudnn.forward_drawn(*operands, layout, rule, False)
    assert len(placed) == 1
    cudnn.forward_drawn(*operands, layout, rule._replace(scale=rule.scale * 2), False)
    assert len(placed) == 2, "another plan may have other strides"
    for stream in (STREAM + 1, STREAM):
        cudnn_rows.place_once(StandIn(key_for((5, 1, 9))._replace(stats=False)), layout, stream)  # type: ignore[arg-type]
    assert len(placed) == 4, "what is on another stream may not be there yet"
    cudnn.forward(*operands, layout, rule)
    assert placed[-1][1] == operands[0].shape[0] * 4, "stats of their own"


@pytest.mark.usefixtures("on_the_cpu")
def test_plans_that_are_found_by_operands_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is for the same key as if it had been looked for, whatever came before; one thing differs from call to call."""
    draw = random.Random(0)
    keys: list[Any] = []
    looked: list[bool] = []
    plan_of = cudnn.plan_of

    def place(plan: Any, *args: Any) -> Any:
        keys.append(plan.key)
        return SimpleNamespace(pointers=(), workspace=0)

    def look(*args: Any) -> Any:
        looked.append(True)
        return plan_of(*args)

    monkeypatch.setattr(cudnn, "place_once", place)
    monkeypatch.setattr(cudnn, "plan_of", look)
    monkeypatch.setattr(StandIn, "run", lambda *args: None)
    ready: dict[Any, Any] = {}
    rows, heads, dims, gap, start, sequences = 12, [4, 2], [8, 16], 0, 0, 3
    bounds, rule, wants_lse, again = [130, 130], Rule(0.5), True, {False: 0, True: 0}
    gap_g, gap_grads, start_g, start_lse = 0, [0, 0, 0], 0, 0

    def rows_of(count: int, dim: int, gap: int, start: int) -> Tensor:
        memory = torch.zeros(start + rows * (count * dim + gap), dtype=torch.bfloat16)[start:]
        return memory.view(rows, -1)[:, : count * dim].unflatten(1, (count, dim))

    for _ in range(900):
        change = draw.randrange(13)
        if change == 0:
            rows = draw.choice([12, 17])
        elif change == 1:
            heads = draw.choice([[4, 2], [4, 4], [2, 2]])
        elif change == 2:
            dims = draw.choice([[8, 16], [16, 16], [8, 8]])
        elif change == 3:
            gap = draw.choice([0, 16])
        elif change == 4:
            start = draw.choice([0, 8, 1])
        elif change == 5:
            sequences = draw.choice([3, 40])
        elif change == 6:
            bounds[draw.randrange(2)] = draw.choice([130, 300])
        elif change == 7:
            rule = rule._replace(scale=draw.choice([0.5, 0.25]), window_right=draw.choice([-1, 0]))
        elif change == 8:
            wants_lse = not wants_lse
        elif change == 9:
            gap_g = draw.choice([0, 8, 3])
        elif change == 10:
            gap_grads[draw.randrange(3)] = draw.choice([0, 8])
        elif change == 11:
            start_g = draw.choice([0, 8, 1])
        else:
            start_lse = draw.choice([0, 4, 1])
        sizes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]))
        operands = [rows_of(*size, gap, start) for size in sizes]
        offsets = torch.zeros(sequences + 1, dtype=torch.int32)
        layout = Layout(offsets, offsets, *bounds, tails_unread=True, lse_by_row=True)
        for known in ({}, ready, ready):
            monkeypatch.setattr(cudnn, "_ready", known)
            looked.clear()
            cudnn.forward_drawn(*operands, layout, rule, wants_lse)
        again[False] += not looked
        assert bool(looked) == (start == 1), "what is copied is another tensor each time"
        assert keys[-1] == keys[-2] == keys[-3]
        grads = tuple(rows_of(*size, each, 0) for size, each in zip(sizes, gap_grads))
        out, grad_out = rows_of(heads[0], dims[1], 0, 0), rows_of(heads[0], dims[1], gap_g, start_g)
        lse = torch.zeros(rows * heads[0] + start_lse)[start_lse:].view(rows, heads[0])
        for known in ({}, ready, ready):
            monkeypatch.setattr(cudnn, "_ready", known)
            looked.clear()
            cudnn.backward_into(grads, grad_out, out, lse, torch.empty(0), *operands, layout, rule)  # type: ignore[arg-type]
        again[True] += not looked
        assert bool(looked) == (1 in (start, start_g, start_lse) or gap_g == 3)
        if start_lse != 1:  # else lse is copied, and nothing is shared
            assert keys[-1] == keys[-2] == keys[-3]
    assert min(again.values()) > 100
    assert len({key for key in keys if key.backward}) > 50
    assert len({key for key in keys if not key.backward}) > 50


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("step", [1, 2])
def test_seeds_are_read_where_they_are(step: int, offset: int, by_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    operands, layout, rule = packed_operands((5, 1, 9), dropout_p=0.5)
    found: list[list[int]] = []
    monkeypatch.setattr(
        StandIn, "run", lambda self, index, stream, pointers, workspace: found.append(memory(pointers[-2], 2, torch.int64).tolist())
    )
    seeds = torch.arange(20, 40)[offset::step]
    for seeds_at in (0, 3):
        given = layout._replace(lse_by_row=by_row, seeds_at=seeds_at, seeds=seeds)
        out, lse, rng_state = cudnn.forward(*operands, given, rule)
        assert rng_state.numel() == 0
        for wants_lse in (False, True):
            cudnn.forward_drawn(*operands, given, rule, wants_lse)
        cudnn.backward(out, None, out, lse, seeds, *operands, given, rule)
        assert found == [seeds[seeds_at : seeds_at + 2].tolist()] * 4
        found.clear()


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [(5, 1, 9), (0, 7, 0, 3), (1,)], ids=str)
def test_lse_by_row(lengths: tuple[int, ...], window: str) -> None:
    """As cuDNN writes it and reads it again, in packed graphs and where there is more to do."""
    operands, layout, rule = packed_operands(lengths, window=WINDOWS[window])
    used = torch.tensor([max(n - 1, 0) for n in lengths], dtype=torch.int32)
    layouts = [layout, layout._replace(tails_unread=False), layout._replace(seqused_k=used)]
    kept.never_written(layout.cu_seq_q)
    layouts.append(layout._replace(cu_seq_q=(offsets := layout.cu_seq_q.clone()), cu_seq_k=offsets))
    for one in layouts:
        rows = slice(sum(lengths) if one.tails_unread else None)
        out, lse, rng_state = cudnn.forward(*operands, one, rule)
        found, by_row, _ = cudnn.forward(*operands, one._replace(lse_by_row=True), rule)
        assert by_row.is_contiguous()
        assert by_row.shape == lse.shape[::-1]
        assert torch.equal(found[rows], out[rows])
        assert torch.equal(by_row[rows], lse[:, rows].t())
        given = (torch.randn_like(out), None, out)
        rows_of = one._replace(lse_by_row=True)
        wanted = cudnn.backward(*given, lse, rng_state, *operands, one, rule)
        for grad, want in zip(cudnn.backward(*given, by_row, rng_state, *operands, rows_of, rule), wanted):
            assert torch.equal(grad[rows], want[rows])


def test_layers_share_where_sequences_lie_in_training(placed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    operands, layout, rule = packed_operands((5, 1, 9))
    layout = layout._replace(lse_by_row=True)
    kept.never_written(layout.cu_seq_q)
    monkeypatch.setattr(cudnn, "finish_forward", None)
    results = [cudnn.forward(*operands, layout, rule) for _ in range(3)]
    assert [stats for _, stats in placed] == [0]
    with monkeypatch.context() as context:
        context.setattr(cudnn, "place_backward", None)
        for out, lse, rng_state in results:
            cudnn.backward(torch.randn_like(out), None, out, lse, rng_state, *operands, layout, rule)
        assert [stats for _, stats in placed] == [0, 0]
    out, lse, rng_state = results[0]
    # Where a kernel of cuDNN's must not begin to read.
    apart = torch.full((80,), math.nan)[5:77].view(18, 4).copy_(lse)
    expected = cudnn.backward(out, None, out, lse, rng_state, *operands, layout, rule)
    for grad, want in zip(cudnn.backward(out, None, out, apart, rng_state, *operands, layout, rule), expected):
        assert torch.equal(grad[:15], want[:15])


def test_others_are_computed_as_ever(placed: list[tuple[int, int]]) -> None:
    """What may have queries without keys, rows to be zeroed, or more to give."""
    operands, layout, rule = packed_operands((5, 1, 9))
    kept.never_written(layout.cu_seq_q)
    used = torch.tensor([2, 1, 0], dtype=torch.int32)
    for other in (
        layout._replace(cu_seq_k=layout.cu_seq_q.clone()),
        layout._replace(seqused_k=used),
        layout._replace(tails_unread=False),
    ):
        out, _ = cudnn.forward_drawn(*operands, other, rule, False)
        assert torch.equal(out[:15], cudnn.forward(*operands, other, rule)[0][:15])
    for scale in (0.0, -0.5):
        out, _ = cudnn.forward_drawn(*operands, layout, rule._replace(scale=scale), False)
        assert torch.equal(out[:15], cudnn.forward(*operands, layout, rule._replace(scale=scale))[0][:15])
    assert [stats for _, stats in placed] == [18 * 4] * 10


# --- plans -----------------------------------------------------------------------------------------------------------


def key_for(lengths: tuple[int, ...], tail: int = 0, max_q: int = 100, square: bool = True, backward: bool = False) -> Key:
    case = make_case(lengths, heads=(4, 2), tail=tail)
    offsets = case.cu_seq_q, case.cu_seq_q if square else case.cu_seq_k
    operands = [x.detach() for x in case.operands[:3]]
    strides = tuple(x.stride() for x in (*operands, *([case.query, *operands] if backward else [])))
    return cudnn.key_of(backward, *operands, strides, Layout(*offsets, max_q, max_q), Rule(0.5))


def test_no_plan_depends_on_the_number_of_tokens() -> None:
    key = key_for((5, 9, 3))
    assert key == key_for((1, 2, 90), tail=40)
    assert key == key_for((5, 9, 3), max_q=128)
    assert key != key_for((5, 9, 3), max_q=129)
    assert key != key_for((5, 9))
    assert key != key_for((5, 9, 3), square=False)
    assert key != key_for((5, 9, 3), backward=True)
    assert not key.wide


def test_offsets_beyond_32_bits_are_wide() -> None:
    ends = torch.zeros(2, dtype=torch.int32)
    for step, wide in ((2**20, False), (2**21, True)):
        rows = torch.empty(1, 2, 8).expand(1024, 2, 8)
        key = cudnn.key_of(False, rows, rows, rows, ((step, 8, 1),) * 3, Layout(ends, ends, 1, 1), Rule(1.0))
        assert key.wide == wide


@pytest.mark.usefixtures("on_the_cpu")
def test_a_plan_is_found_again() -> None:
    ends = torch.tensor([0, 3, 5], dtype=torch.int32)

    def plan(tokens: int, ends_k: Tensor = ends, max_q: int = 9, backward: bool = False) -> StandIn:
        rows = torch.empty(1, 2, 8).expand(tokens, 2, 8)
        strides = ((16, 8, 1),) * (7 if backward else 3)
        return cudnn.plan_of(backward, rows, rows, rows, strides, Layout(ends, ends_k, max_q, 9), Rule(1.0))  # type: ignore[return-value]

    first = plan(5)
    assert plan(999_999) is first
    assert plan(5, ends.clone()).key == first.key._replace(square=False)
    assert plan(5, backward=True).key == first.key._replace(backward=True, strides=((16, 8, 1),) * 7)
    wide = plan(2**28)
    assert wide.key == first.key._replace(wide=True)
    assert plan(5) is first


def test_rounded() -> None:
    for least in (1, 128):
        steps = {cudnn.rounded(n, least) for n in range(1, 4097)}
        assert all(step % least == 0 for step in steps)
        assert all(n <= cudnn.rounded(n, least) < max(n * 9 / 8 + 1, n + least) for n in range(1, 4097))
        assert len(steps) < 90
    assert [cudnn.rounded(n, 1) for n in (0, 1, 9, 16, 17, 64, 65)] == [1, 1, 9, 16, 18, 64, 72]
    assert [cudnn.rounded(n, 128) for n in (0, 1, 512, 513, 2048, 2049)] == [128, 128, 512, 640, 2048, 2304]


# --- rows, with PyTorch operations and with the Triton kernels in Triton's interpreter -------------------------------


def check_places() -> None:
    used = torch.tensor([4, 0, 9, 2], dtype=torch.int32)
    ends_q, ends_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 7, 7, 20], [0, 4, 9, 18, 25]))
    for wide, seqused_k, call in itertools.product((False, True), (None, used), ("forward", "backward", "backward by row")):
        layout, backward = Layout(ends_q, ends_k, 13, 9, seqused_k), call != "forward"
        strides = ((96, 8, 1), (16, 8, 1), (32, 16, 1), (64, 16, 1), (40, 8, 1), (72, 8, 1), (88, 16, 1))[: 7 if backward else 3]
        key = Key(backward, ends_q.device, torch.float16, 6, 128, 128, 4, 2, 8, 16, strides, False, wide, Rule(1.0))
        plan: Any = StandIn(key)
        if call == "backward":
            lse = torch.randn(4, 70)
            lse[1, 3] = -math.inf
            places = cudnn_rows.place_backward(plan, layout, lse, STREAM)
            lse[1, 3] = math.inf
            assert torch.equal(memory(places.stats, 280, torch.float32).view(70, 4), lse.t())
        else:
            places = cudnn_rows.place(plan, layout, ends_q, 280 if call == "forward" else 0, STREAM)
        assert all(pointer % 16 == 0 for pointer in (*places.pointers, places.stats, places.workspace))
        if call != "backward by row":
            assert places.workspace + WORKSPACE <= min(places.pointers)
        dtype = torch.int64 if wide else torch.int32
        start, end = places.buffer.data_ptr(), places.buffer.data_ptr() + places.buffer.nbytes
        sizes = [7 * dtype.itemsize] * len(plan.names) + [6 * 4] * 2
        assert all(start <= pointer <= end - size for pointer, size in zip(places.pointers, sizes, strict=True))
        steps = {"q": 96, "k": 16, "v": 32, "o": 64, "stats": 4, "g": 64, "dq": 40, "dk": 72, "dv": 88}
        for name, pointer in zip(plan.names, places.pointers):
            ends = (ends_q if name in OF_QUERIES else ends_k).tolist()
            ends += [ends[-1]] * 2
            assert memory(pointer, 7, dtype).tolist() == [end * steps[name] for end in ends], name
        counts = [memory(pointer, 6, torch.int32).tolist() for pointer in places.pointers[-2:]]
        expected = [[3, 4, 0, 13], [4, 5, 0, 7]] if seqused_k is None else [[3, 0, 0, 13], [4, 0, 0, 2]]
        assert counts == [[*row, 0, 0] for row in expected]


def check_finish() -> None:
    ends_q, ends_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 7, 7, 150], [0, 4, 4, 9, 12]))
    used = torch.tensor([2, 0, 5, 1], dtype=torch.int32)
    for right, seqused_k, tails_unread in itertools.product((-1, 0, 2), (None, used), (False, True)):
        layout = Layout(ends_q, ends_k, 143, 5, seqused_k, tails_unread=tails_unread)
        blind, unused = torch.ones(160, dtype=torch.bool), torch.ones(15, dtype=torch.bool)
        for i, keys in enumerate((4, 0, 5, 3) if seqused_k is None else (2, 0, 5, 1)):
            start, stop = ends_q[i : i + 2].tolist()
            for row in range(start, stop):
                blind[row] = keys == 0 or (right >= 0 and row - start + keys - (stop - start) + right < 0)
            if stop > start:
                unused[int(ends_k[i]) : int(ends_k[i]) + keys] = False
        strides = ((24, 8, 1), (8, 8, 1), (16, 16, 1), (48, 16, 1), (32, 8, 1), (8, 8, 1), (40, 16, 1))
        rule = Rule(1.0, window_right=right)
        key = Key(True, ends_q.device, torch.float32, 4, 256, 128, 3, 1, 8, 16, strides, False, False, rule)
        plan: Any = StandIn(key)
        places = cudnn_rows.place(plan, layout, ends_q, 480, STREAM)
        stats = cudnn_rows.stats_of(plan, places, 160).copy_(torch.randn(160, 3))
        out, lse = torch.ones(160, 3, 16), torch.empty(3, 160)
        cudnn_rows.finish_forward(plan, layout, places, out, lse, STREAM)
        rows = slice(0, 150) if tails_unread else slice(None)
        assert torch.equal(lse[:, rows], torch.where(blind[:, None], -math.inf, stats).t()[:, rows])
        assert torch.equal(out[rows] == 0, blind[rows, None, None].expand(out[rows].shape))
        # Rows of the gradients are apart, and what is between them is not touched.
        memories = torch.ones(160, 32), torch.ones(15, 8), torch.ones(15, 40)
        grads = memories[0][:, 8:].view(160, 3, 8), memories[1].view(15, 1, 8), memories[2][:, :16].view(15, 1, 16)
        cudnn_rows.finish_backward(plan, layout, grads)
        for grad, zero, end in zip(grads, (blind, unused, unused), (150, 12, 12)):
            rows = slice(0, end) if tails_unread else slice(None)
            assert torch.equal(grad[rows] == 0, zero[rows, None, None].expand(grad[rows].shape))
        assert memories[0][:, :8].eq(1).all()
        assert memories[2][:, 16:].eq(1).all()


def test_places() -> None:
    check_places()


def test_finish() -> None:
    check_finish()


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("has_used", [False, True])
def test_later_launches_get_the_same_as_the_first(has_used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first gets tensors and goes through Triton, later ones get addresses and do not."""
    log: list[Any] = []
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    monkeypatch.setattr(launch, "knobs", SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(cudnn_rows, "_with_triton", lambda x: True)
    for name in ("place", "place_backward", "finish_forward"):
        monkeypatch.setattr(cudnn_rows, f"_launch_{name}", launch.Launcher(Compiled(name, log)), raising=False)
    ends, used = torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([2, 4], dtype=torch.int32)
    layout = Layout(ends, ends.clone(), 4, 4, used if has_used else None)
    query, lse = torch.randn(7, 4, 8), torch.randn(4, 7)
    plans: list[Any] = []
    for backward in (False, True):
        strides = ((32, 8, 1), (16, 8, 1), (16, 8, 1), (32, 8, 1), (32, 8, 1), (16, 8, 1), (16, 8, 1))[: 7 if backward else 3]
        plans.append(StandIn(Key(backward, ends.device, torch.float32, 2, 128, 128, 4, 2, 8, 8, strides, False, False, Rule(1.0))))
    memory = {plan: cudnn_rows._new_places(plan, lse, lse.numel(), with_workspace=True) for plan in plans}
    plans.append(StandIn(plans[1].key))
    memory[plans[2]] = cudnn_rows._new_places(plans[2], lse, 0, with_workspace=False)
    monkeypatch.setattr(cudnn_rows, "_new_places", lambda plan, like, stats, with_workspace: memory[plan])
    for _ in range(2):
        places = cudnn_rows.place(plans[0], layout, lse, lse.numel(), STREAM)
        cudnn_rows.finish_forward(plans[0], layout, places, query, lse, STREAM)
        cudnn_rows.place_backward(plans[1], layout, lse, STREAM)
        cudnn_rows.place(plans[2], layout, lse, 0, STREAM)
    assert [name for name, *_ in log] == ["place", "finish_forward", "place_backward", "place"] * 2
    assert log[:4] == log[4:]


def check_kernels() -> None:
    cudnn_rows._with_triton = lambda x: True
    check_places()
    check_finish()


@needs_interpreter
def test_kernels() -> None:
    interpret("ops/backends/test_cudnn", "check_kernels")


# --- what it runs ----------------------------------------------------------------------------------------------------


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(torch.device("cpu"), torch.bfloat16, 4, 4, 64, 64)
    assert cudnn.supports(problem) == "it runs on CUDA only"
    monkeypatch.setattr(cudnn, "_unavailable", lambda device: None)
    problem = problem._replace(device=torch.device("cuda", 0))
    for supported in (
        {},
        {"window_right": 0},
        {"window_left": 5, "window_right": 0},
        {"window_left": 5, "window_right": 9},
        {"dropout_p": 0.1},
        {"seqused_k": True},
        {"positions": True},
        {"head_dim": 128, "head_dim_v": 8, "num_heads_k": 1},
    ):
        assert cudnn.supports(problem._replace(**supported)) is None
    for reason, refused in {
        "it computes in float16 or bfloat16, not torch.float32": {"dtype": torch.float32},
        "its head dim is at most 256, not 264": {"head_dim_v": 264},
        "its head dims are multiples of 8, and these are 64 and 60": {"head_dim_v": 60},
        "a window that speaks of positions is unknown to it": {"window_right": 0, "positions": True},
        "it has no softcap here": {"softcap": 30.0},
        "it does not read keys in pages here": {"paged": True, "page_size": 16},
        "its deterministic backward needs memory that grows with the square of the length": {"deterministic": True},
        "it was not tested for results that do not depend on the batch": {"batch_invariant": True},
        "it drops no weights inside of a window": {"window_right": 0, "dropout_p": 0.1},
        "it cannot drop everything": {"dropout_p": 1.0},
    }.items():
        assert cudnn.supports(problem._replace(**refused)) == reason


def test_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    unavailable = cudnn._unavailable.__wrapped__
    monkeypatch.setattr(cudnn.importlib.util, "find_spec", lambda name: None)
    assert unavailable(device) == "nvidia-cudnn-frontend is not installed (pip install nvidia-cudnn-frontend)"
    monkeypatch.setattr(cudnn.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert unavailable(device) == "it was tested with compute capability 9.0 only, and this device has 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    class Library:
        @staticmethod
        def backend_version() -> int:
            return 91002

    monkeypatch.setattr(cudnn, "library", Library)
    assert unavailable(device) == "it needs cuDNN 91900, and 91002 is installed"

    def broken() -> None:
        raise ImportError("libcudnn.so.9 is not there")

    monkeypatch.setattr(cudnn, "library", broken)
    assert unavailable(device) == "nvidia-cudnn-frontend cannot be imported: libcudnn.so.9 is not there"
