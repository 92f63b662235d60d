"""Rows behind sequences, by PyTorch operations and by the Triton kernel in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from launch_stand_in import compiled, note_launches
from torch import Tensor

from triton_interpreter import interpret, needs_interpreter
from varlen_inductor.ops.backends import tails
from varlen_inductor.ops.backends.order import MOST_SEQUENCES, Order
from varlen_inductor.ops.problem import Layout

BAD = (math.nan, math.inf, -math.inf)
NAN_WITH_A_MESSAGE = {torch.float32: (torch.int32, 0x7FC01234), torch.bfloat16: (torch.int16, 0x7FC5)}


def layout(ends_q: tuple[int, ...], ends_k: tuple[int, ...], **options: bool) -> Layout:
    return Layout(torch.tensor(ends_q).int(), torch.tensor(ends_k).int(), 9, 9, **options)


def rows(tokens: int, heads: int, dim: int, how: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(tokens, heads, dim, dtype=dtype)
    if how == "slice":
        return torch.randn(tokens, 3, heads, dim, dtype=dtype)[:, 1].copy_(x)
    return torch.randn(heads, tokens, dim, dtype=dtype).transpose(0, 1).copy_(x) if how == "heads first" else x


def spoil(x: Tensor, behind: list[int]) -> Tensor:
    for i, row in enumerate(behind):
        x[row, i % x.shape[1], i % x.shape[2]] = BAD[i % 3]
    bits, message = NAN_WITH_A_MESSAGE[x.dtype]
    x.view(bits)[behind[0], -1, -1] = message
    return x


def bits(x: Tensor) -> Tensor:
    return x.view(NAN_WITH_A_MESSAGE[x.dtype][0]).clone()


def check() -> None:
    for how in ("plain", "slice", "heads first"):
        for dtype in (torch.float32, torch.bfloat16):
            cases = (
                spoil(rows(10, 4, 8, how, dtype), [7, 9, 8]),
                spoil(rows(10, 4, 16, how, dtype), [9]),
                spoil(rows(13, 2, 8, how, dtype), [8, 12]),
                spoil(rows(13, 2, 16, how, dtype), [12]),
            )
            held = [bits(x) for x in cases]
            k, v = cases[2:]
            for queries in (cases[:2], cases[:1]):
                expected = [torch.where(x.isfinite(), x, 0.0) for x in (*queries, k, v)]
                with tails.finite_behind(queries, (k, v), layout((0, 2, 2, 7), (0, 3, 4, 8))) as after:
                    assert len(after) == len(expected)
                    assert all(map(torch.equal, after, expected))
                assert all(map(torch.equal, map(bits, cases), held))


def check_sequences_are_left_alone() -> None:
    q, k, v = (torch.full((n, 2, 8), math.nan) for n in (9, 11, 11))
    with tails.finite_behind((q,), (k, v), layout((0, 2, 7), (0, 3, 8))) as (q, k, v):
        assert q[:7].isnan().all()
        assert k[:8].isnan().all()
        assert (q[7:] == 0).all()
        assert (v[8:] == 0).all()


def check_no_rows_behind() -> None:
    q, k, v = (torch.full((n, 2, 8), math.nan) for n in (7, 8, 8))
    with tails.finite_behind((q,), (k, v), layout((0, 7), (0, 8))) as operands:
        assert all(x.isnan().all() for x in operands)


def check_more_rows_than_are_reached() -> None:
    end, some = 3, 2 * tails.REACH
    q, k, v = (torch.full((some, 1, 8), math.nan) for _ in range(3))
    with tails.finite_behind((q, q), (k, k), layout((0, 3), (0, 3))) as operands:
        assert all((x[end : end + tails.REACH] == 0).all() for x in operands)
    assert all(x.isnan().all() for x in (q, k, v))
    hidden, _ = tails.hide_value(v, layout((0, 3), (0, 3)))
    assert (hidden.operands[0][end : end + tails.REACH] == 0).all()
    assert hidden.operands[0][:end].isnan().all()
    tails.restore_forward(hidden, torch.empty(some, 1, 8), torch.empty(1, some))
    assert v.isnan().all()


def check_shared_rows() -> None:
    """What is written to a row that is another row, too, would show there."""
    row = torch.full((1, 2, 8), math.inf)
    q, k, v = (row.expand(5, 2, 8) for _ in range(3))
    with tails.finite_behind((q,), (k, v), layout((0, 2), (0, 3))) as (q, k, _):
        assert (row == math.inf).all()
        assert (q[:2] == math.inf).all()
        assert (q[2:] == 0).all()
        assert (k[3:] == 0).all()


def check_what_fails() -> None:
    """The caller's rows are as they were also where the attention raises."""
    q = rows(5, 2, 8, "plain").index_fill_(0, torch.tensor([4]), math.nan)
    with pytest.raises(ValueError, match="attention"), tails.finite_behind((q,), (q, q), layout((0, 4), (0, 4))):
        raise ValueError("attention")
    assert q[4].isnan().all()


def check_finished() -> None:
    """One launch puts the caller's rows back and finishes the results. In a forward only those of value are another's."""
    ends = torch.tensor([[0, 0], [2, 3], [7, 8]], dtype=torch.int32)
    some = Layout(ends[:, 0], ends[:, 1], 9, 9)  # offsets that are apart
    for how, dtype in (("plain", torch.float32), ("slice", torch.bfloat16), ("heads first", torch.bfloat16)):
        q, g = (spoil(rows(10, 4, dim, how, dtype), [7, 9, 8]) for dim in (8, 16))
        k, v = (spoil(rows(80, 2, dim, how, dtype), [79, 8, 12, 70]) for dim in (8, 16))
        held = [bits(x) for x in (q, g, k, v)]
        out, lse = torch.full((10, 4, 16), math.nan, dtype=dtype), torch.full((4, 10), math.nan)
        out[:7], lse[:, :7] = 1.0, 0.5
        hidden, order = tails.hide_value(v, some)
        assert order is None
        assert torch.equal(hidden.operands[0], torch.where(v.isfinite(), v, 0.0))
        assert all(map(torch.equal, map(bits, (q, g, k)), held))
        tails.restore_forward(hidden, out, lse)
        assert all(map(torch.equal, map(bits, (q, g, k, v)), held))
        behind = torch.arange(10) >= 7
        assert torch.equal(out, (~behind).to(dtype)[:, None, None].expand_as(out))
        assert torch.equal(lse, torch.where(behind, -math.inf, 0.5).expand_as(lse))

        joined = torch.ones(80, 90, dtype=dtype)
        grads = tuple(x.unflatten(1, (-1, dim)) for x, dim in zip(joined.split([32, 16, 32, 10], 1), (8, 8, 16)))
        for grad_query, grad_key, grad_value in (
            (torch.ones(10, 4, 8, dtype=dtype), *(torch.ones(80, 2, dim, dtype=dtype) for dim in (6, 16))),
            (grads[0][:10], *grads[1:]),
        ):
            hidden = tails.hide(q, g, k, v, some)
            assert all(map(torch.equal, hidden.operands, [torch.where(x.isfinite(), x, 0.0) for x in (q, g, k, v)]))
            tails.restore_backward(hidden, (grad_query, grad_key, grad_value))
            assert all(map(torch.equal, map(bits, (q, g, k, v)), held))
            for grad, end in ((grad_query, 7), (grad_key, 8), (grad_value, 8)):
                assert (grad[:end] == 1.0).all()
                assert (grad[end:] == 0.0).all()
        assert (joined[10:, :32] == 1.0).all()
        assert (joined[:, 80:] == 1.0).all()


def check_many_rows(many: int = 300) -> None:
    """More than programs share in one step, behind the end and before it; and none at all."""
    for tokens, end in ((many, many - 1), (many, 1), (2, 0), (0, 0)):
        offsets = torch.tensor([0, end], dtype=torch.int32)
        q = torch.full((tokens, 2, 8), math.nan)
        out, lse, grads = torch.ones(tokens, 2, 8), torch.zeros(2, tokens), tuple(torch.ones(tokens, 2, 8) for _ in range(3))
        tails.restore_forward(tails.hide_value(q, Layout(offsets, offsets, 9, 9))[0], out, lse)
        tails.restore_backward(tails.hide(q, q, q, q, Layout(offsets, offsets, 9, 9)), (grads[0], grads[1], grads[2]))
        assert q.isnan().all()
        for x in (out, *grads):
            assert (x[:end] == 1.0).all()
            assert (x[end:] == 0.0).all()
        assert (lse[:, :end] == 0.0).all()
        assert (lse[:, end:] == -math.inf).all()


def check_order() -> None:
    """The longest sequences first, those of one length as they come; only with Triton."""
    draw = torch.Generator().manual_seed(0)
    v = torch.full((9, 2, 8), math.nan)
    for count in (1, 2, 9, 32, 33, MOST_SEQUENCES):
        for apart in (False, True):
            offsets = [torch.zeros(count + 1, dtype=torch.int32) for _ in range(2)]
            for x in offsets:
                x[1:] = torch.randint(0, 6, (count,), generator=draw).cumsum(0)
            cu_q, cu_k = offsets if apart else (offsets[0], offsets[0])
            hidden, order = tails.hide_value(v, Layout(cu_q, cu_k, 9, 9), ordering=True)
            assert order is not None
            expected = cu_k.diff().argsort(descending=True, stable=True)
            for cu, starts, used in ((cu_q, order.starts_q, order.used_q), (cu_k, order.starts_k, order.used_k)):
                assert torch.equal(starts, torch.cat([cu[:-1][expected], cu[-1:]]))
                assert torch.equal(used, cu.diff()[expected])
            assert (order.starts_q is order.starts_k) == (order.used_q is order.used_k) == (not apart)
            first = min(int(cu_k[-1]), 9)
            assert v[:first].isnan().all()
            assert (v[first:] == 0.0).all()
            tails.restore_forward(hidden, torch.ones(9, 2, 8), torch.zeros(2, 9))
            assert v.isnan().all()
    some = torch.arange(2 * MOST_SEQUENCES + 4, dtype=torch.int32)
    for cu in (some[: MOST_SEQUENCES + 2], some[::2][:4]):
        assert tails.hide_value(v, Layout(cu, cu, 9, 9), ordering=True)[1] is None


def test_no_order_without_triton() -> None:
    some = torch.tensor([0, 2, 7], dtype=torch.int32)
    assert tails.hide_value(torch.ones(9, 2, 8), Layout(some, some, 5, 5), ordering=True)[1] is None


def check_all(many: int = 300) -> None:
    check()
    check_sequences_are_left_alone()
    check_no_rows_behind()
    check_more_rows_than_are_reached()
    check_shared_rows()
    check_what_fails()
    check_finished()
    check_many_rows(many)


def test_operations() -> None:
    check_all()


def test_nothing_is_done_where_nobody_reads() -> None:
    q, k, v = (torch.full((5, 2, 8), math.nan) for _ in range(3))
    with tails.finite_behind((q,), (k, v), layout((0, 2), (0, 3), tails_unread=True)) as operands:
        assert all(x is y for x, y in zip(operands, (q, k, v)))
        assert all(x.isnan().all() for x in operands)


def test_later_launches_get_the_same_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first gets tensors and goes through Triton, later ones get addresses and do not."""
    pytest.importorskip("triton")
    log = note_launches(monkeypatch, tails)
    kept = torch.empty(9999)
    monkeypatch.setattr(Tensor, "new_empty", lambda x, size: kept)
    ends = torch.tensor([0, 2, 3], dtype=torch.int32)
    some = Layout(ends, ends.clone(), 2, 2)
    order = Order(*(torch.empty(size, dtype=torch.int32) for size in (3, 2, 3, 2)))
    monkeypatch.setattr(tails, "empty_order", lambda *_: order)
    (q, g), (k, v) = [rows(5, 4, 16, how) for how in ("plain", "slice")], [rows(6, 2, 16, how) for how in ("heads first", "plain")]
    out, lse, grads = torch.ones(5, 4, 16), torch.zeros(4, 5), (torch.ones(5, 4, 16), torch.ones(6, 2, 16), torch.ones(6, 2, 16))

    def calls() -> None:
        for ordering in (False, True):
            tails.restore_forward(tails.hide_value(v, some, ordering)[0], out, lse)
        tails.restore_backward(tails.hide(q, g, k, v, some), grads)
        with tails.finite_behind((q, g), (k, v), some):
            pass

    for _ in range(2):
        calls()
    monkeypatch.setattr(tails, "stream_of", lambda index: None)  # on a device that is not the current one
    calls()
    forwards = ["hide_value", "restore_forward"] * 2
    assert [name for name, *_ in log[:8]] == [*forwards, "hide", "restore_backward", "hide", "put_back"]
    assert log[:8] == log[8:16] == log[16:]
    assert compiled(tails) == 6


@pytest.mark.parametrize("early", [False, True])
def test_the_kernel_behind_a_forward_starts_early(monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
    """Where the device can do that: the kernel waits, and its launch does not."""
    pytest.importorskip("triton")
    log = note_launches(monkeypatch, tails)
    monkeypatch.setattr(tails, "starts_early", lambda index: early)
    ends, value = torch.tensor([0, 2, 3], dtype=torch.int32), rows(5, 2, 16, "plain")
    for _ in range(2):
        tails.restore_forward(tails.hide_value(value, Layout(ends, ends, 2, 2))[0], torch.ones(5, 2, 16), torch.zeros(2, 5))
    hiding, restoring = tails._launch_hide_value.kernel, tails._launch_restore_forward.kernel
    assert "launch_pdl" not in hiding.options
    assert restoring.options == ({"launch_pdl": True} if early else {})
    names = [p.name for p in tails._restore_forward_kernel.params]
    assert [args[names.index("EARLY")] for name, _, args in log if name == "restore_forward"] == [early] * 2


def test_what_a_kernel_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a number of rows, unless it needs 64 bits, nor for a last offset; but for what is a multiple of 16."""
    pytest.importorskip("triton")
    note_launches(monkeypatch, tails)
    ends = torch.tensor([0, 2, 3], dtype=torch.int32)

    def known(q: Tensor, k: Tensor, end: int = 3) -> int:
        """Of a forward and a backward, two each."""
        tokens, heads, dim = q.shape
        some = Layout(ends[:end], ends[1:], 9, 9)
        tails.restore_forward(tails.hide_value(k, some)[0], torch.ones(tokens, heads, dim), torch.zeros(heads, tokens))
        tails.restore_backward(tails.hide(q, q, k, k, some), (q, k, k))
        return compiled(tails)

    k = rows(6, 2, 16, "plain")
    for tokens, end in ((5, 3), (16, 2), (1, 3), (300, 3)):
        assert known(rows(tokens, 4, 16, "plain"), k, end) == 4
    assert known(rows(5, 4, 16, "slice"), k) == 4  # steps that are multiples, too
    memory = torch.ones(999)
    assert known(memory[4:324].view(5, 4, 16), k) == 4
    assert known(memory[1:321].view(5, 4, 16), k) == 6  # nothing else in a forward, where nobody looks at query
    assert known(rows(5, 4, 16, "plain"), memory[1:193].view(6, 2, 16)) == 10
    assert known(memory[:120].view(5, 24)[:, :16].view(5, 1, 16), k[:, :1]) == 14
    assert known(memory.as_strided((1, 4, 16), (2**31, 16, 1)), k) == 16
    out, lse = memory[1:321].view(5, 4, 16), torch.zeros(4, 5)
    tails.restore_forward(tails.hide_value(k, Layout(ends, ends, 9, 9))[0], out, lse)
    assert compiled(tails) == 17


def few_programs() -> None:
    """Enough to share rows; each is interpreted in turn, whether it has any to look at or not."""
    for name in ("_GRID", "_GRID_GRAD", "_GRID_VALUE", "_GRID_BACKWARD"):
        setattr(tails, name, (getattr(tails, name)[0], 4, 1))


def check_kernel() -> None:
    tails._with_triton = lambda x: True
    few_programs()
    check_all(many=100)
    check_order()


@needs_interpreter
def test_kernel() -> None:
    interpret("ops/backends/test_tails", "check_kernel")
