"""Three projections of the same packed rows become one where that gains, and nothing else does."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from varlen_inductor.ops import attention  # noqa: F401  (registers the operators)
from varlen_inductor.patterns import recompute
from varlen_inductor.patterns.join_projections import MOST_NUMBERS, join_projections

aten = torch.ops.aten
T, E, H = 12, 8, 2


@dataclass
class Case:
    """Three projections and their attention; what differs from one case to the next."""

    widths: tuple[int, int, int] = (E, E, E)
    bias: tuple[bool, bool, bool] = (True, True, True)
    dtypes: tuple[torch.dtype, ...] = (torch.float64,) * 3
    trained: tuple[bool, bool, bool] = (True, True, True)
    groups: tuple[int | None, ...] = (None,) * 4
    rows: tuple[int, int, int] = (0, 0, 0)
    """Which operand each projects."""
    operand: int = E
    device: str = "cpu"
    packed: bool = True
    cast: bool = False
    read_before: bool = False
    double: bool = False
    """The same projection is query and key."""

    def graph(self) -> fx.GraphModule:
        graph = fx.Graph()
        inputs = [graph.placeholder(f"x{i}") for i in range(max(self.rows) + 1)]
        offsets = graph.placeholder("offsets")
        parameters = []
        with FakeTensorMode():
            if not self.packed:
                for x in inputs:
                    x.meta["val"] = torch.empty(T, self.operand, dtype=self.dtypes[0], device=self.device)
            for name, width, bias, dtype, trained in zip("qkv", self.widths, self.bias, self.dtypes, self.trained, strict=True):
                w, b = graph.placeholder(f"w{name}"), graph.placeholder(f"b{name}") if bias else None
                for each, shape in ((w, (width, self.operand)), (b, (width,))):
                    if each is not None:
                        each.meta = {"val": torch.empty(shape, dtype=dtype, device=self.device), "requires_grad": trained}
                parameters.append((w, b))
            operands = []
            for i, (w, b) in enumerate(parameters):
                if self.cast:  # as under autocast: the operand of the last comes behind the first
                    value = w.meta["val"]
                    w = graph.call_function(aten.mul.Tensor, (w, 1.0))
                    w.meta = {"val": value, "requires_grad": True}
                y = graph.call_function(aten.linear.default, (inputs[self.rows[i]], w, b))
                z = graph.call_function(aten.reshape.default, (y, [-1, H, self.widths[i] // H]))
                for node in (y, z):
                    node.meta |= {} if self.groups[i] is None else {recompute._KEY: self.groups[i]}
                operands.append(z)
            if self.double:
                operands[1] = operands[0]
            if self.read_before:
                graph.call_function(aten.add.Tensor, (operands[2], 1.0))
        attend = torch.ops.varlen_inductor.varlen_attn.default
        out = graph.call_function(attend, (*operands, offsets, offsets, 7, 7), {"kernels": "cpu"})
        out.meta |= {} if self.groups[3] is None else {recompute._KEY: self.groups[3]}
        graph.output(graph.call_function(operator.getitem, (out, 0)))
        return fx.GraphModule(nn.Module(), graph)

    def operands(self) -> list[Tensor]:
        torch.manual_seed(0)
        found: list[Tensor] = [torch.randn(T, self.operand, dtype=self.dtypes[0]) for _ in range(max(self.rows) + 1)]
        found.append(torch.tensor([0, 5, 5, 12], dtype=torch.int32))
        for width, bias, dtype in zip(self.widths, self.bias, self.dtypes, strict=True):
            found.append(torch.randn(width, self.operand, dtype=dtype))
            if bias:
                found.append(torch.randn(width, dtype=dtype))
        return [x.requires_grad_() if x.is_floating_point() else x for x in found]


def results(gm: fx.GraphModule, operands: list[Tensor]) -> tuple[Tensor, ...]:
    """The output, and the gradients of all operands."""
    out = gm(*operands)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad((out * weights).sum(), [x for x in operands if x.requires_grad])


def calls_of(gm: fx.GraphModule) -> str:
    return "\n".join(f"{n.name} = {n.target}{n.args[:3]}" for n in gm.graph.nodes if n.op == "call_function")


def linears(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=aten.linear.default))


def test_graph() -> None:
    gm = Case().graph()
    assert join_projections(gm, "cpu") == 1
    assert_expected_inline(
        calls_of(gm),
        """\
cat_default = aten.cat.default([wq, wk, wv],)
cat_default_1 = aten.cat.default([bq, bk, bv],)
linear_default_3 = aten.linear.default(x0, cat_default, cat_default_1)
split_with_sizes_default = aten.split_with_sizes.default(linear_default_3, [8, 8, 8], -1)
getitem_1 = <built-in function getitem>(split_with_sizes_default, 0)
reshape_default = aten.reshape.default(getitem_1, [-1, 2, 4])
getitem_2 = <built-in function getitem>(split_with_sizes_default, 1)
reshape_default_1 = aten.reshape.default(getitem_2, [-1, 2, 4])
getitem_3 = <built-in function getitem>(split_with_sizes_default, 2)
reshape_default_2 = aten.reshape.default(getitem_3, [-1, 2, 4])
varlen_attn_default = varlen_inductor.varlen_attn.default(reshape_default, reshape_default_1, reshape_default_2)
getitem = <built-in function getitem>(varlen_attn_default, 0)""",
    )


JOINED = {
    "alike": Case(),
    "without biases": Case(bias=(False, False, False)),
    "of different widths": Case(widths=(2 * E, 2 * E, E)),
    "weights that are made in between": Case(cast=True),
    "none is trained": Case(trained=(False, False, False)),
    "in one checkpoint": Case(groups=(3, 3, 3, 3)),
    "as wide as may be": Case(operand=MOST_NUMBERS // (3 * E)),
}
APART = {
    "one without a bias": Case(bias=(True, False, True)),
    "one in another dtype": Case(dtypes=(torch.float64, torch.float32, torch.float64)),
    "one is not trained": Case(trained=(True, True, False)),
    "of other rows": Case(rows=(0, 1, 1)),
    "on padded rows": Case(packed=False),
    "one in another checkpoint": Case(groups=(3, 3, 4, 4)),
    "out of a checkpoint": Case(groups=(3, 3, 3, None)),
    "one is read by something else": Case(read_before=True),
    "one twice": Case(double=True),
    "too wide": Case(operand=MOST_NUMBERS // (3 * E) + 1),
}


@pytest.mark.parametrize("case", JOINED)
def test_is_joined(case: str) -> None:
    gm, operands = JOINED[case].graph(), JOINED[case].operands()
    wanted = results(gm, operands)
    assert join_projections(gm, "cpu") == 1
    assert linears(gm) == 1
    torch.testing.assert_close(results(gm, operands), wanted)


@pytest.mark.parametrize("case", APART)
def test_stays_apart(case: str) -> None:
    gm = APART[case].graph()
    before = calls_of(gm)
    assert join_projections(gm, "cpu") == 0
    assert calls_of(gm) == before


def test_stays_on_another_device() -> None:
    assert join_projections(Case().graph()) == 0


def test_keeps_its_checkpoint() -> None:
    gm = Case(groups=(3, 3, 3, 3)).graph()
    assert join_projections(gm, "cpu") == 1
    grouped = {node.target for node in gm.graph.nodes if recompute.group_of(node) == 3}
    assert {aten.cat.default, aten.linear.default, aten.split_with_sizes.default} <= grouped


def test_gradients_are_side_by_side() -> None:
    """What the backward does is one product for the weights, one for the rows and one sum; the attention's three results meet in a
    concatenation, which `lowering.joined_gradients` looks for."""
    from varlen_inductor.lowering.joined_gradients import join_gradients

    gm, operands = Case().graph(), Case().operands()
    assert join_projections(gm, "cpu") == 1
    backward = make_fx(lambda *given: results(gm, list(given)), tracing_mode="fake")(*operands)
    assert len(backward.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)) == 1
    assert join_gradients(backward.graph) == 1
