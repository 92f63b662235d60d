"""A key of a launch stands for all that a compiled Triton kernel depends on, and a kind of attention for its constants.

Launches are not made but noted, and Triton is asked what it would make of the arguments of each.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from varlen_inductor.ops.backends import tails, triton_kernel
from varlen_inductor.ops.backends.launch import Compiled, Launcher
from varlen_inductor.ops.problem import Layout, Rule

specialize = pytest.importorskip("triton._C.libtriton").native_specialize_impl
CUDA = pytest.importorskip("triton.backends.nvidia.compiler").CUDABackend


class Launch(NamedTuple):
    kernel: Any
    key: Any
    args: dict[str, Any]
    options: dict[str, Any]

    def compiled_for(self) -> tuple[Any, ...]:
        """What Triton compiles the kernel for."""
        kinds = [
            ("constant", self.args[p.name])
            if p.is_constexpr
            else specialize(CUDA, self.args[p.name], p.is_const, not p.do_not_specialize, not p.do_not_specialize_on_alignment)
            for p in self.kernel.params
        ]
        return (*kinds, *sorted(self.options.items()))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """All that are made, as on Hopper."""
    made: list[Launch] = []

    def note(self: Launcher, grid: Any, key: Any, stream: Any, tensors: Any, addresses: Any, *args: Any, **options: Any) -> None:
        assert list(addresses) == [x if x is None else x.data_ptr() for x in tensors]
        names = [p.name for p in self.kernel.params]
        made.append(Launch(self.kernel, key, dict(zip(names, (*tensors, *args), strict=True)), options))

    monkeypatch.setattr(Launcher, "with_addresses", note)
    monkeypatch.setattr(triton_kernel, "_is_hopper", lambda device: True)
    monkeypatch.setattr(triton_kernel, "_known", {})
    before = torch.get_float32_matmul_precision()
    yield made
    torch.set_float32_matmul_precision(before)


def rows_of(rows: int, heads: int, dim: int, dtype: torch.dtype, offset: int, gap: int) -> Tensor:
    """(rows, heads, dim) that begins ``offset`` elements into its memory, with ``gap`` elements behind each row."""
    memory = torch.zeros(offset + rows * (heads * dim + gap), dtype=dtype)[offset:]
    return memory.view(rows, heads * dim + gap)[:, : heads * dim].view(rows, heads, dim)


def some_call(draw: random.Random) -> tuple[Any, ...]:
    """Operands of a forward, then a gradient of its output."""
    torch.set_float32_matmul_precision(draw.choice(["highest", "high"]))
    dtype = draw.choice([torch.bfloat16, torch.bfloat16, torch.float32])
    rows, heads_k, dim, sequences = (draw.choice(x) for x in ((1, 2, 16, 17, 32), (1, 2), (1, 16), (1, 2, 16)))
    heads = heads_k * draw.choice([1, 2])
    gap, offset = draw.choice([0, 0, 0, 1]), draw.choice([0, 0, 8, 1])

    def operand(h: int) -> Tensor:
        return rows_of(rows, h, dim, dtype, offset, gap)

    ends = torch.zeros(sequences + 1, dtype=torch.int32)
    used = torch.zeros(sequences, dtype=torch.int32) if draw.random() < 0.3 else None
    position = torch.zeros(rows, dtype=torch.int64) if draw.random() < 0.3 else None
    window = draw.choice([(-1, -1), (-1, 0), (16, 0), (2**40, 1)])
    dropout_p, softcap = draw.choice([0.0, 0.0, 0.75]), draw.choice([0.0, 0.0, 1.0])
    rule = Rule(draw.choice([1.0, 0.5, -0.5, 0.0]), *window, dropout_p, softcap, draw.random() < 0.3)
    bounds = draw.choice([1, 16, 512, 513, 2048]), draw.choice([1, 16, 2048])
    layout = Layout(ends, ends, *bounds, used, position, position)
    return operand(heads), operand(heads_k), operand(heads_k), layout, rule, operand(heads)


def test_keys(launches: list[Launch]) -> None:
    draw = random.Random(0)
    known: dict[Any, tuple[Any, ...]] = {}
    repeated = 0
    for _ in range(6000):
        query, key, value, layout, rule, gradient = some_call(draw)
        out, lse, rng_state = triton_kernel.forward(query, key, value, layout, rule)
        if draw.random() < 0.3:
            given = layout._replace(seeds=rng_state.view(torch.int64) if rule.dropout_p > 0.0 else None)
            triton_kernel.forward_drawn(query, key, value, given, rule, draw.random() < 0.5)
        gap = draw.choice([0, 3, 16])
        grads = tuple(rows_of(*x.shape, x.dtype, 0, gap) for x in (query, key, value))
        triton_kernel.backward_into(grads, gradient, out, lse, rng_state, query, key, value, layout, rule)
        for launch in launches:
            found = launch.compiled_for()
            repeated += (launch.kernel, launch.key) in known
            assert known.setdefault((launch.kernel, launch.key), found) == found
            if launch.kernel.fn.__name__ != "delta_kernel":
                check_numbers(launch, query, key, layout, rule)
        launches.clear()
    assert repeated > 1000, "nothing was compared"


def test_launches_that_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched past all of this has what it would have had, and is for the same compiled kernel."""
    made: list[tuple[Any, ...]] = []
    looked: list[bool] = []

    def launch(self: Launcher, grid: Any, key: Any, stream: Any, tensors: Any, addresses: Any, *args: Any, **options: Any) -> None:
        names = [p.name for p in self.kernel.params]
        compiled = Launch(self.kernel, key, dict(zip(names, (*tensors, *args), strict=True)), options).compiled_for()
        self.compiled[key] = Compiled(None, lambda *given: made.append((compiled, given)), "function", "metadata")
        looked.append(True)
        made.append((compiled, (*grid, stream, "function", "metadata", None, None, None, *addresses, *args)))

    hooks: list[str] = []
    prepared: dict[Any, Any] = {}
    before = torch.get_float32_matmul_precision()
    memory = torch.zeros(2048)
    monkeypatch.setattr(Launcher, "with_addresses", launch)
    monkeypatch.setattr(triton_kernel, "_is_hopper", lambda device: True)
    monkeypatch.setattr(triton_kernel, "_known", {})
    monkeypatch.setattr(triton_kernel, "_launcher", functools.cache(triton_kernel._launcher.__wrapped__))
    monkeypatch.setattr(triton_kernel, "_stream", lambda index: 7)
    monkeypatch.setattr(triton_kernel, "hooked", lambda: bool(hooks))
    monkeypatch.setattr(triton_kernel, "empty", lambda like, *size, dtype: memory[: math.prod(size)].view(size))
    draw = random.Random(0)
    again = 0

    def launched(known: dict[Any, Any], call: tuple[Any, ...]) -> list[Any]:
        made.clear()
        looked.clear()
        out, lse, seeds, query, key, value, layout, rule, grads, *gradients = call
        if grads is None:
            monkeypatch.setattr(triton_kernel, "_prepared", known)
            triton_kernel._attend(out, lse, seeds, query, key, value, layout, rule)
        else:
            monkeypatch.setattr(triton_kernel, "_prepared_backward", known)
            triton_kernel._differentiate(grads, *gradients, out, lse, seeds, query, key, value, layout, rule)
        return list(made)

    for _ in range(500):
        query, key, value, layout, rule, gradient = some_call(draw)
        rule = rule._replace(scale=abs(rule.scale) or 2.0)  # others take another query
        out = query.new_zeros(query.shape[0], query.shape[1], value.shape[-1])
        lse = torch.zeros(query.shape[1], query.shape[0])
        seeds = torch.zeros(4, dtype=torch.int64)[draw.choice([0, 1]) :][:2]
        operands = [query, key, value]
        grads = [torch.empty_like(x) for x in operands]
        for _ in range(8):
            given = (seeds, *operands, layout, rule)
            for call in ((out, lse, *given, None), (out, None, *given, None), (out, lse, *given, grads, gradient, None)):
                assert launched({}, call) == launched(prepared, call)
                again += not looked
                assert looked or not hooks
            # What is copied or turned on the way is looked at: its addresses are others each time.
            odd = layout.cu_seq_q.repeat_interleave(2)[::2]
            for layout_, rule_, seeds_ in (
                (layout._replace(cu_seq_q=odd), rule, seeds),
                (layout, rule._replace(scale=-rule.scale), seeds),
                (layout, rule._replace(dropout_p=0.25), seeds.repeat_interleave(2)[::2]),
            ):
                for _ in range(2):
                    launched(prepared, (out, lse, seeds_, *operands, layout_, rule_, None))
                    assert looked
                    launched(prepared, (out, lse, seeds_, *operands, layout_, rule_, grads, gradient, None))
                    assert looked
            # The next call differs in one thing.
            change, which, gap, offset = draw.randrange(11), draw.randrange(3), draw.choice([0, 8, 16, 3]), draw.choice([0, 4, 8])
            hooks[:] = ["theirs"] * (change == 0)
            if change == 1:
                layout = layout._replace(max_q=draw.choice([1, 16, 512, 513, 2048]))
            elif change == 2:
                layout = layout._replace(max_k=draw.choice([1, 16, 512, 513, 2048]))
            elif change == 3:
                grads[which] = rows_of(*grads[which].shape, grads[which].dtype, offset, gap)
            elif change == 4:
                operands[which] = rows_of(*operands[which].shape, query.dtype, offset, gap)
            elif change == 5:
                gradient = rows_of(*gradient.shape, gradient.dtype, offset, gap)
            elif change == 6:
                rule = rule._replace(dropout_p=draw.choice([0.0, 0.25]), window_left=draw.choice([-1, 4]))
            elif change == 7:
                ends = torch.zeros(draw.choice([2, 5, 6]), dtype=torch.int32)
                layout = layout._replace(cu_seq_q=ends, cu_seq_k=draw.choice([ends, ends.clone()]), seqused_k=None)
            elif change == 8:
                out = rows_of(*out.shape, out.dtype, offset, gap)
            elif change == 9:
                torch.set_float32_matmul_precision(draw.choice(["highest", "high"]))
            elif change == 10:
                gradient = gradient.to(draw.choice([torch.float32, query.dtype]))
    torch.set_float32_matmul_precision(before)
    assert again > 500, "nothing was launched so"


def test_keys_of_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward's launches in which rows behind the last sequence are hidden, and come back."""
    made: list[Launch] = []

    def note(self: Launcher, grid: Any, key: Any, *args: Any, **options: Any) -> None:
        made.append(Launch(self.kernel, key, dict(zip((p.name for p in self.kernel.params), args, strict=True)), options))

    monkeypatch.setattr(Launcher, "__call__", note)
    monkeypatch.setattr(tails, "_with_triton", lambda x: True)
    monkeypatch.setattr(tails, "stream_of", lambda index: None)
    draw = random.Random(0)
    known: dict[Any, tuple[Any, ...]] = {}
    repeated = 0
    for _ in range(3000):
        dtype = draw.choice([torch.bfloat16, torch.bfloat16, torch.float16])
        rows, rows_k, heads_k, dim = (draw.choice(x) for x in ((1, 2, 16, 17), (1, 2, 16, 17), (1, 2), (1, 16, 32)))
        heads = heads_k * draw.choice([1, 2])
        offset, ahead, gap = draw.choice([0, 0, 8, 1]), draw.choice([0, 0, 8, 1]), draw.choice([0, 0, 1, 16])
        value = rows_of(rows_k, heads_k, dim + draw.choice([0, 0, 1, 16]), dtype, offset, gap)[:, :, :dim]
        out = rows_of(rows, heads, dim, dtype, ahead, 0)
        if draw.random() < 0.1:
            value = value[:1].as_strided((1, heads_k, dim), (2**31 + draw.choice([0, 1]), dim, 1))
        lse = torch.zeros(heads * rows + 1)[draw.choice([0, 0, 1]) :][: heads * rows].view(heads, rows)
        ends = torch.zeros(draw.choice([2, 5, 17, 18, 40]) + 1, dtype=torch.int32)[draw.choice([0, 1]) :]
        ends_k = ends if draw.random() < 0.5 else ends.clone()
        tails.restore_forward(tails.hide_value(value, Layout(ends, ends_k, 1, 1), draw.random() < 0.5)[0], out, lse)
        hiding, restoring = made
        assert hiding.args["value"] is restoring.args["value"] is value
        assert restoring.args["out"] is out
        for launch in made:
            found = launch.compiled_for()
            repeated += (launch.kernel, launch.key) in known
            assert known.setdefault((launch.kernel, launch.key), found) == found
        made.clear()
    assert repeated > 1000, "nothing was compared"


def check_numbers(launch: Launch, query: Tensor, key: Tensor, layout: Layout, rule: Rule) -> None:
    """What is worked out once for a kind of attention is this call's."""
    args, scale = launch.args, abs(rule.scale) or 1.0
    log2_e = 1.4426950408889634
    assert args["scale"] == pytest.approx((rule.softcap or scale) * log2_e)
    assert args["inner"] == (pytest.approx(scale / rule.softcap) if rule.softcap else None)
    assert args["threshold"] == round((1.0 - rule.dropout_p) * 2**32)
    widest = 2**30 if layout.position_q is None else 2**63
    assert (args["left"], args["right"]) == (min(rule.window_left, widest), min(rule.window_right, widest))
    assert (args["LEFT"], args["RIGHT"]) == (rule.window_left != -1, rule.window_right != -1)
    assert (args["GROUPS"], args["DIM"], args["DIM_V"]) == (query.shape[1] // key.shape[1], query.shape[2], query.shape[2])
    if query.dtype == torch.float32:
        assert args["PRECISION"] == ("tf32" if torch.get_float32_matmul_precision() == "high" else "tf32x3")
    if launch.kernel.fn.__name__ == "query_kernel":
        assert args["scale_out"] == rule.scale
    if launch.kernel.fn.__name__ == "key_kernel":
        assert (args["scale_out"], args["rows_k"]) == (scale, key.shape[0])


@pytest.mark.parametrize("longest", [1, 512, 513, 4096])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (7, -1)], ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_blocks(longest: int, dropout_p: float, window: tuple[int, int], batch_invariant: bool, launches: list[Launch]) -> None:
    """How a sequence is cut never depends on the others' lengths where the batch must not matter."""
    rows = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    ends = torch.tensor([0, 4], dtype=torch.int32)
    rule = Rule(0.1, *window, dropout_p, batch_invariant=batch_invariant)
    triton_kernel.forward(rows, rows, rows, Layout(ends, ends, longest, longest), rule)
    (launch,) = launches
    if dropout_p > 0.0:
        table = triton_kernel.HOPPER_DROPOUT
    elif longest <= 512 and not batch_invariant:
        table = triton_kernel.HOPPER_SHORT
    else:
        table = triton_kernel.HOPPER if window == (-1, -1) else triton_kernel.HOPPER_WINDOWED
    blocks = table[2, 64].forward
    assert (launch.args["BLOCK_M"], launch.args["BLOCK_N"]) == (blocks.queries, blocks.keys)
    assert launch.options == {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
