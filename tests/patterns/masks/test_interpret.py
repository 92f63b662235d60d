"""Interpretation: for each operator, the index expression of its result, evaluated at every index, is its result."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from mask_cases import output_of, record, values_of
from torch import fx

from varlen_inductor.patterns.masks.algebra import Builder
from varlen_inductor.patterns.masks.expr import Expr, text
from varlen_inductor.patterns.masks.interpret import Interpreter, value_of
from varlen_inductor.patterns.masks.lower import Lowering, run
from varlen_inductor.patterns.masks.predicate import _sizes_of as sizes_of


@dataclass
class Axis:
    position: torch.Tensor
    size: Any


def element(gm: fx.GraphModule) -> tuple[Interpreter, Expr]:
    """The expression of the output at index [i0, i1, ...]."""
    node = output_of(gm)
    shape = value_of(node).shape
    it = Interpreter(Builder({f"i{d}": n for d, n in enumerate(shape)}))
    return it, it.at(node, tuple(it.b.index(f"i{d}") for d in range(len(shape))))


def evaluated(gm: fx.GraphModule, e: Expr, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The expression at every index, and the output itself."""
    env = values_of(gm, inputs)
    node = output_of(gm)
    real, fake = env[node], value_of(node)
    axes = {
        f"i{d}": Axis(torch.arange(n).view([-1 if d == j else 1 for j in range(real.dim())]), n) for d, n in enumerate(real.shape)
    }
    symbols = sizes_of({n: v for n, v in env.items() if isinstance(v, torch.Tensor)})
    lower = Lowering(run, env.__getitem__, axes, lambda s: int(s.subs(symbols)), torch.device("cpu"))
    assert e.dtype is fake.dtype or (not e.dtype.is_floating_point and e.dtype is not torch.bool)
    return lower.tensor(e).to(real.dtype).expand(real.shape), real


def m34() -> torch.Tensor:
    return torch.arange(12).view(3, 4) * 7 % 5


PROGRAMS: dict[str, Callable[..., torch.Tensor]] = {
    # views
    "unsqueeze": lambda m: m[:, None, None, :],
    "unsqueeze last": lambda m: m.unsqueeze(-1).unsqueeze(0),
    "squeeze": lambda m: m[:, None].squeeze(1),
    "squeeze all": lambda m: m[:, None, :, None].squeeze(),
    "squeeze nothing": lambda m: m.squeeze(0),
    "expand": lambda m: m[:, None].expand(-1, 2, -1),
    "expand new": lambda m: m.expand(2, *m.shape),
    "expand_as": lambda m: m[:1].expand_as(m),
    "permute": lambda m: m[None].permute(2, 0, 1),
    "transpose": lambda m: m.transpose(0, 1),
    "t": lambda m: m.t(),
    "mT": lambda m: m[None].mT,
    "movedim": lambda m: m[None, :, :, None].movedim((0, 2), (2, 1)),
    "swapaxes": lambda m: m.swapaxes(-1, -2),
    "select": lambda m: m[1],
    "select last": lambda m: m[:, -1],
    "slice": lambda m: m[1:3],
    "slice to the end": lambda m: m[:, -2:],
    "slice with step": lambda m: m[:, ::2],
    "slice with step and start": lambda m: m[:, 1::2],
    "slice beyond": lambda m: m[:, -100:],
    "slice short of the end": lambda m: m[:, 1:-1],
    "narrow": lambda m: m.narrow(1, 1, 2),
    "flip": lambda m: m.flip(0, 1),
    "view": lambda m: m.view(m.shape[0], 1, 1, m.shape[1]),
    "flatten": lambda m: m.flatten(),
    "fold": lambda m: m[:, None].expand(-1, 2, -1).reshape(-1, m.shape[1]),
    "fold and unfold": lambda m: m[:, None].expand(-1, 2, -1).reshape(-1, m.shape[1]).view(m.shape[0], 2, 1, -1),
    "unflatten": lambda m: m.unflatten(1, (2, 2)),
    "mix": lambda m: m.reshape(2, 6).transpose(0, 1).reshape(4, 3),
    "split heads": lambda m: m.reshape(m.shape[0], 2, 2).transpose(1, 2),
    "repeat": lambda m: m.repeat(2, 1, 3),
    "tile": lambda m: m.tile(2),
    "repeat_interleave": lambda m: m.repeat_interleave(2, dim=0),
    "contiguous": lambda m: m.t().contiguous().clone(),
    "unbind": lambda m: m.unbind(1)[2],
    "split": lambda m: m.split(2, 1)[1],
    "split sizes": lambda m: m.split([1, 3], 1)[1],
    "chunk": lambda m: m.chunk(2, 1)[1],
    "meshgrid": lambda m: torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")[1] + m,
    "meshgrid xy": lambda m: torch.meshgrid(torch.arange(3), torch.arange(4), indexing="xy")[0] + m.t(),
    "broadcast_tensors": lambda m: torch.broadcast_tensors(m, torch.arange(3)[:, None])[1],
    "in place rounding": lambda m: torch.ones(3, 4, dtype=torch.bfloat16).mul_(m.float() * 1.001),
    "stack": lambda m: torch.stack([m, m + 1], 1),
    "cat": lambda m: torch.cat([m, m[:, 1:] * 2, m.flip(1)], 1),
    "cat of dtypes": lambda m: torch.cat([m, m.float() / 2], 0),
    "pad": lambda m: torch.nn.functional.pad(m, (1, 2, 0, 1), value=9),
    "negative pad": lambda m: torch.nn.functional.pad(m, (-1, 2)),
    "slice_scatter": lambda m: torch.slice_scatter(m, m[:, 1:3] * 10, 1, 2, 4),
    "select_scatter": lambda m: torch.select_scatter(m, m[0] + 50, 0, 1),
    "index": lambda m: m[torch.arange(3)[:, None], torch.arange(4)[None] - 1],
    "index last": lambda m: m[:, torch.arange(3) + 1],
    "index apart": lambda m: m[:, None][torch.arange(2), :, torch.arange(2) + 1],
    "index by data": lambda m: m[m[:, 0] % 3],
    "index negative by data": lambda m: m[:, -(m[0] % 3)],
    "gather": lambda m: torch.gather(m, 1, m % 4),
    "index_select": lambda m: m.index_select(1, m[0] % 4),
    "outer": lambda m: m[:, :, None] @ m[:, None, :],
    "einsum": lambda m: torch.einsum("bi,bj->bij", m, m),
    # values
    "arange": lambda m: torch.arange(2, 14, 3) + m,
    "arange down": lambda m: torch.arange(4, 0, -1) + m,
    "float arange": lambda m: torch.arange(4, dtype=torch.float32) * m,
    "int32": lambda m: m.int() * 2 - torch.arange(4, dtype=torch.int32),
    "uint8": lambda m: (1 - m).to(torch.uint8),
    "uint8 arithmetic": lambda m: m.to(torch.uint8) - 3,
    "ones": lambda m: torch.ones_like(m) + m.new_ones(4) + torch.ones(3, 1),
    "full": lambda m: torch.full((3, 4), 2.5) + torch.full_like(m, 3) + m.new_full((4,), 7),
    "zeros": lambda m: torch.zeros(3, 4, dtype=torch.bool) | m.new_zeros(4).bool(),
    "scalar tensor": lambda m: torch.where(m > 2, torch.tensor(-1.5), torch.tensor(0.5)),
    "eye": lambda m: torch.eye(4, dtype=torch.long)[:3] + m,
    "tril": lambda m: m.tril(),
    "tril diagonal": lambda m: m[:, :3].tril(-1),
    "triu": lambda m: m.triu(1),
    "sum of all": lambda m: m + m.sum(),
    "rsub": lambda m: 1 - m,
    "rsub float": lambda m: 1.0 - m,
    "subtract alpha": lambda m: torch.sub(m, m.t()[0, 0], alpha=3),
    "mul": lambda m: m * m.flip(1) * -2,
    "mul positions": lambda m: torch.arange(4) * torch.arange(3)[:, None] + m,
    "div": lambda m: m / 3,
    "floor_divide": lambda m: m // 2 + torch.arange(4) // 3,
    "div floor": lambda m: torch.div(m, 2, rounding_mode="floor"),
    "div trunc": lambda m: torch.div(torch.arange(4), 2, rounding_mode="trunc") + m,
    "remainder": lambda m: m % 2 + torch.arange(4) % 3,
    "neg abs": lambda m: -(m - 3).abs(),
    "maximum": lambda m: torch.maximum(m, m.flip(0)) + torch.minimum(m, torch.full_like(m, 2)),
    "clamp": lambda m: m.clamp(1, 3) + m.clamp(max=2) + m.float().clamp_min(0.5).long(),
    "log": lambda m: (m % 2).float().log(),
    "half": lambda m: m.to(torch.float16) * 1e4,
    "bfloat16": lambda m: m.to(torch.bfloat16) * torch.finfo(torch.float32).min,
    "half overflow": lambda m: (m.float() * 1e5).half(),
    "type_as": lambda m: m.type_as(torch.ones(1, dtype=torch.float64)) / 7,
    "compare": lambda m: (m > 1) & (m <= 3) | (m == 0),
    "compare floats": lambda m: (m.float() / 2 >= 0.5) ^ (m < 2.5),
    "compare tensors": lambda m: (m < m.flip(1)) | (m.float() == torch.arange(4)),
    "compare bool": lambda m: (m > 1) == (m % 2).bool(),
    "compare to True": lambda m: (m > 1) == True,  # noqa: E712
    "bool arithmetic": lambda m: (m > 1) * (m < 3) + (m == 0),
    "bool and int": lambda m: (m > 1) + m,
    "logical": lambda m: torch.logical_and(m, m.flip(0)).logical_or(m == 3).logical_xor(m > 0).logical_not(),
    "bitwise": lambda m: ~(m > 1) & (m < 4),
    "bits": lambda m: (m & 1) + (m | 2),
    "isinf": lambda m: torch.isinf((m % 2).float().log()) & ~torch.isneginf(m.float()) & ~torch.isnan(m.float()),
    "where": lambda m: torch.where(m > 2, m, -1),
    "where broadcast": lambda m: torch.where(m[:1] > 2, m.float(), torch.arange(3)[:, None]),
    "masked_fill": lambda m: m.float().masked_fill(m == 1, -math.inf),
    "masked_fill tensor": lambda m: m.masked_fill(m == 1, torch.tensor(7)),
    "in place": lambda m: torch.zeros(3, 4).masked_fill_(m == 1, 2.0).add_(1).mul_(m),
    "fill": lambda m: torch.empty(3, 4).fill_(2.0) + m,
    "iand": lambda m: _iand(m),
    "any": lambda m: m.bool().any(1, keepdim=True) & (m > 1),
    "dropout": lambda m: torch.nn.functional.dropout(m.float(), 0.5, training=False),
    "cumsum": lambda m: m.cumsum(1) > 2,
    "data": lambda m: torch.sin(m.float()) > 0.3,
}


def _iand(m: torch.Tensor) -> torch.Tensor:
    x = m > 1
    x &= m < 3
    return x


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_operator(name: str) -> None:
    gm = record(PROGRAMS[name], m34())
    _, e = element(gm)
    for inputs in (m34(), m34().flip(0), torch.zeros_like(m34())):
        ours, real = evaluated(gm, e, [inputs])
        assert torch.equal(ours.nan_to_num(123), real.nan_to_num(123)), f"{text(e)}\n{ours}\n{real}"


STATIC_ONLY = {
    *("broadcast_tensors", "in place rounding"),
    *("unflatten", "mix", "split heads", "slice beyond", "meshgrid", "meshgrid xy", "arange", "arange down", "float arange"),
    *("int32", "full", "ones", "zeros", "eye", "cat of dtypes", "pad", "mul positions", "floor_divide", "remainder", "div trunc"),
    *("compare tensors", "where broadcast", "in place", "fill", "slice with step", "slice with step and start", "index"),
    *("chunk", "repeat", "tile", "unbind", "split", "split sizes", "tril diagonal", "squeeze nothing", "stack"),
}


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - STATIC_ONLY))
def test_operator_with_dynamic_sizes(name: str) -> None:
    gm = record(PROGRAMS[name], m34(), dynamic=True)
    _, e = element(gm)
    for shape in ((3, 4), (5, 7)):
        inputs = torch.arange(shape[0] * shape[1]).view(shape) * 7 % 5
        ours, real = evaluated(gm, e, [inputs])
        assert torch.equal(ours.nan_to_num(123), real.nan_to_num(123)), f"{text(e)}\n{ours}\n{real}"


def expression(program: Callable[..., torch.Tensor], *inputs: torch.Tensor, dynamic: bool = False) -> str:
    return text(element(record(program, *(inputs or (m34(),)), dynamic=dynamic))[1])


def test_expressions() -> None:
    shown = {
        "padding": expression(lambda m: (1.0 - m[:, None, None, :].float()) * -1e4),
        "causal": expression(lambda m: torch.ones(4, 4).tril() == 0),
        "lengths": expression(lambda n: torch.arange(4)[None] < n[:, None], torch.tensor([1, 2, 3])),
        "left": expression(lambda n: torch.arange(4)[None] >= 4 - n[:, None], torch.tensor([1, 2, 3])),
        "folded": expression(lambda m: m[:, None].expand(-1, 2, -1).reshape(6, 4).view(3, 2, 4)),
        "still folded": expression(lambda m: m[:, None].expand(-1, 2, -1).reshape(6, 4)),
        "assigned": expression(lambda m: torch.slice_scatter(torch.zeros(3, 4), m[:, :2], 1, 0, 2)),
        "clamped": expression(lambda m: torch.arange(4).clamp(max=2) <= m),
        "dynamic": expression(lambda m: torch.arange(m.shape[1]) < m.shape[1] - 1, dynamic=True),
        "dynamic fold": expression(lambda m: m[:, None].expand(-1, 2, -1).reshape(-1, m.shape[1]), dynamic=True),
        "always": expression(lambda m: torch.arange(m.shape[1]) < m.shape[1], dynamic=True),
        "reduced": expression(lambda m: m.sum(1)),
    }
    assert_expected_inline(
        "\n".join(f"{name}: {e}" for name, e in shown.items()),
        """\
padding: (1 - m_1[i0, i3].to(float32)) * -10000
causal: where(i0 >= i1, 1, 0) == 0
lengths: i1 < n_1[i0]
left: i1 + n_1[i0] > 3
folded: m_1[i0, i2]
still folded: m_1[i0 // 2, i1]
assigned: where(i1 <= 1, m_1[i0, i1].to(float32), 0)
clamped: i1 <= m_1[i0, i1] or m_1[i0, i1] > 1
dynamic: i0 + 2 <= s96
dynamic fold: m_1[i0 // 2, i1]
always: True
reduced: m_1.sum(1)[i0]""",
    )


def test_a_value_without_a_rule_is_a_leaf() -> None:
    gm = record(lambda m: torch.sin(m.float()) > 0.3, m34())
    it, e = element(gm)
    (leaf,) = e.loads
    assert "aten.sin" in it.why[leaf]
    assert str(leaf.target) == "aten.sin.default"


def test_writes_are_opaque() -> None:
    def program(m: torch.Tensor) -> torch.Tensor:
        x = m * 2
        y = x + 1
        x.zero_()
        return y + x

    gm = record(program, m34())
    it, e = element(gm)
    assert it.written
    assert {str(n.target) for n in e.loads} & {"aten.mul.Tensor", "aten.add.Tensor", "aten.zero_.default"}


def test_graphs_are_not_kept_alive() -> None:
    gm = record(lambda m: m.sum(1, keepdim=True) > torch.arange(4), m34())
    gm.graph.__dict__["kept"] = element(gm)[1]  # as proofs are
    graph = weakref.ref(gm.graph)
    del gm
    gc.collect()
    assert graph() is None
