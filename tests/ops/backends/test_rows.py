"""The rows behind the last sequence, by PyTorch operations and by the Triton kernels in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from launch_stand_in import compiled, note_launches

from triton_interpreter import interpret, needs_interpreter
from varlen_inductor import _compat_operators
from varlen_inductor.ops.backends import rows


def check(many: int = 3000) -> None:
    for tokens, end_q, end_k in ((5, 3, 5), (5, 5, 0), (many, many - 1, 7), (0, 0, 0)):
        cu_seq_q = torch.tensor([0, 2, end_q], dtype=torch.int32)
        cu_seq_k = torch.tensor([0, 2, end_k], dtype=torch.int32)
        out, lse = torch.full((tokens, 2, 8), math.nan), torch.zeros(2, tokens)
        out[:end_q], lse[:, end_q:] = 1.0, math.nan
        if end_q:
            lse[1, 0] = math.inf
        rows.finish_forward(out, lse, cu_seq_q)
        assert (out[:end_q] == 1.0).all()
        assert (out[end_q:] == 0.0).all()
        assert (lse[:, end_q:] == -math.inf).all()
        assert lse[:, :end_q].isinf().sum() == (1 if end_q else 0)

        joined = torch.ones(tokens, 90)
        apart = (torch.ones(tokens, 4, 8), torch.ones(tokens, 2, 8), torch.ones(tokens, 2, 16))
        columns = tuple(x.unflatten(1, (-1, dim)) for x, dim in zip(joined.split([32, 16, 32, 10], 1), (8, 8, 16)))
        for grads in (apart, (columns[0], columns[1], columns[2])):
            rows.finish_backward(grads, cu_seq_q, cu_seq_k)
            for grad, end in zip(grads, (end_q, end_k, end_k)):
                assert (grad[:end] == 1.0).all()
                assert (grad[end:] == 0.0).all()
        assert (joined[:, 80:] == 1.0).all()


def check_offsets_apart() -> None:
    """The last one is found in any strides."""
    offsets = torch.tensor([[0, 9], [2, 9], [3, 9]], dtype=torch.int32)[:, 0]
    out, lse = torch.ones(5, 2, 8), torch.zeros(2, 5)
    rows.finish_forward(out, lse, offsets)
    assert (out[:3] == 1.0).all()
    assert (out[3:] == 0.0).all()
    assert lse.isinf().sum() == 4
    grads = (torch.ones(5, 2, 8), torch.ones(6, 2, 8), torch.ones(6, 2, 8))
    rows.finish_backward(grads, offsets, offsets)
    assert [int(x[:, 0, 0].sum()) for x in grads] == [3, 3, 3]


def test_operations() -> None:
    check()
    check_offsets_apart()


def test_later_launches_get_the_same_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first gets tensors and goes through Triton, later ones get addresses and do not."""
    pytest.importorskip("triton")
    log = note_launches(monkeypatch, rows)
    ends = torch.tensor([0, 2, 3], dtype=torch.int32)
    out, lse, grads = torch.ones(5, 2, 8), torch.zeros(2, 5), (torch.ones(5, 2, 8), torch.ones(6, 1, 8), torch.ones(6, 1, 16))
    for _ in range(2):
        rows.finish_forward(out, lse, ends)
        rows.finish_backward(grads, ends, ends)
    assert [name for name, *_ in log] == ["forward", "backward"] * 2
    assert log[:2] == log[2:]
    assert compiled(rows) == 2
    monkeypatch.setattr(rows, "stream_of", lambda index: None)  # on a device that is not the current one
    rows.finish_forward(out, lse, ends)
    rows.finish_backward(grads, ends, ends)
    assert log[4:] == log[:2]


def test_what_a_kernel_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a number of rows, unless it needs 64 bits; but for what is a multiple of 16."""
    pytest.importorskip("triton")
    note_launches(monkeypatch, rows)
    ends = torch.tensor([0, 2, 3], dtype=torch.int32)
    for tokens, end in ((5, 3), (16, 3), (1, 2), (7, 2)):
        rows.finish_forward(torch.ones(tokens, 2, 8), torch.zeros(2, tokens), ends[:end])
        rows.finish_backward((torch.ones(tokens, 2, 8),) * 3, ends[:end], ends[1:])
        assert compiled(rows) == 2
    memory = torch.ones(999)
    for some in (memory[4:], memory[1:]):  # 16 bytes from where memory begins, and 4
        rows.finish_forward(some[:80].view(5, 2, 8), torch.zeros(2, 5), ends)
    assert compiled(rows) == 3
    rows.finish_forward(memory[:120].view(5, 24)[:, :16].unflatten(1, (2, 8)), torch.zeros(2, 5), ends)
    assert compiled(rows) == 4
    far = memory.as_strided((1, 2, 8), (2**31, 8, 1))
    rows.finish_forward(far, torch.zeros(2, 1), ends)
    rows.finish_backward((far, far, far), ends, ends)
    assert compiled(rows) == 6


def test_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat_operators, "current_device_index", lambda: 1)
    monkeypatch.setattr(_compat_operators, "current_stream_pointer", lambda index: 40 + index)
    assert [rows.stream_of(index) for index in (-1, 0, 1)] == [None, None, 41]


def check_kernels() -> None:
    rows._with_triton = lambda x: True
    rows._GRID = (4, 1, 1)  # each program is interpreted in turn, whether it has rows to look at or not
    check(many=1100)  # more blocks than programs
    check_offsets_apart()


@needs_interpreter
def test_kernels() -> None:
    interpret("ops/backends/test_rows", "check_kernels")
