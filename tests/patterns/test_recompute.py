"""Marked nodes become calls of checkpoint again."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn

from varlen_inductor import _compat
from varlen_inductor.patterns import recompute

aten = torch.ops.aten


def grouped(build: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node], *groups: tuple[int, int]) -> fx.GraphModule:
    """A graph of two inputs, of whose calls ``groups`` (first, last) are marked, before `regroup`."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(build(graph, x, y))
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    for number, (first, last) in enumerate(groups):
        recompute.mark(calls[first : last + 1], number)
    return fx.GraphModule(nn.Module(), graph)


def text(gm: fx.GraphModule) -> str:
    """The graph, then those inside of it."""
    lines = []
    for module in gm.modules():
        for node in module.graph.nodes:
            if node.op == "output":
                lines.append(f"return {node.args[0]}")
            elif node.op != "placeholder":
                target = getattr(node.target, "__name__", node.target) if node.op == "call_function" else "self"
                lines.append(f"{node.name} = {target}({', '.join(map(str, node.args))})")
    return "\n".join(lines)


def test_two_groups() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
        first = graph.call_function(aten.sin.default, (x,))
        second = graph.call_function(aten.mul.Tensor, (first, y))
        between = graph.call_function(aten.cos.default, (second,))
        third = graph.call_function(aten.exp.default, (between,))
        return graph.call_function(aten.add.Tensor, (third, first))

    gm = recompute.regroup(grouped(build, (0, 1), (3, 3)))
    assert_expected_inline(
        text(gm),
        """\
recomputed_0 = self()
tag_activation_checkpoint = tag_activation_checkpoint(recomputed_0, x, y)
getitem = getitem(tag_activation_checkpoint, 0)
getitem_1 = getitem(tag_activation_checkpoint, 1)
cos_default = cos.default(getitem_1)
recomputed_1 = self()
tag_activation_checkpoint_1 = tag_activation_checkpoint(recomputed_1, cos_default)
getitem_2 = getitem(tag_activation_checkpoint_1, 0)
add_tensor = add.Tensor(getitem_2, getitem)
return add_tensor
sin_default = sin.default(x)
mul_tensor = mul.Tensor(sin_default, y)
return (sin_default, mul_tensor)
exp_default = exp.default(cos_default)
return (exp_default,)""",
    )
    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    torch.testing.assert_close(gm(x, y), (x.sin() * y).cos().exp() + x.sin())


def test_nothing_marked() -> None:
    gm = grouped(lambda graph, x, y: graph.call_function(aten.add.Tensor, (x, y)))
    assert recompute.regroup(gm) is gm


def test_results_are_tensors_and_sizes_stay_outside() -> None:
    """Elements of a tuple are taken inside; sizes and constants that need nothing of the group are computed before it."""

    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
        size = graph.call_function(aten.sym_size.int, (y, 0))
        parts = graph.call_function(aten.chunk.default, (x, 2))
        twice = graph.call_function(operator.mul, (size, 2))
        taken = graph.call_function(operator.getitem, (parts, 1))
        flat = graph.call_function(aten.reshape.default, (taken, [size]))
        other = graph.call_function(operator.getitem, (parts, 0))
        return graph.call_function(aten.reshape.default, (other, [1, twice])), flat  # type: ignore[return-value]

    gm = recompute.regroup(grouped(build, (0, 2)))
    assert_expected_inline(
        text(gm),
        """\
sym_size_int = sym_size.int(y, 0)
mul = mul(sym_size_int, 2)
recomputed_0 = self()
tag_activation_checkpoint = tag_activation_checkpoint(recomputed_0, x)
getitem = getitem(tag_activation_checkpoint, 0)
getitem_1 = getitem(tag_activation_checkpoint, 1)
reshape_default = reshape.default(getitem, [sym_size_int])
reshape_default_1 = reshape.default(getitem_1, [1, mul])
return (reshape_default_1, reshape_default)
chunk_default = chunk.default(x, 2)
getitem = getitem(chunk_default, 1)
getitem_1 = getitem(chunk_default, 0)
return (getitem, getitem_1)""",
    )


@pytest.mark.parametrize(
    ("target", "args", "reason"),
    [
        (aten.add_.Tensor, lambda x, y: (x, y), "writes in place"),
        (_compat.SET_GRAD_ENABLED, lambda x, y: (False,), "would hold"),
        (_compat.ENTER_AUTOCAST, lambda x, y: ("cpu", torch.bfloat16), "autocast"),
    ],
)
def test_refused(target: Any, args: Callable[..., Any], reason: str) -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
        first = graph.call_function(aten.sin.default, (x,))
        graph.call_function(target, args(first, y))
        return graph.call_function(aten.cos.default, (first,))

    with pytest.raises(recompute.NotRegroupable) as refused:
        recompute.regroup(grouped(build, (0, 2)))
    assert reason in refused.value.reason


def test_interleaved_groups_are_refused() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
        for _ in range(4):
            x = graph.call_function(aten.sin.default, (x,))
        return x

    gm = grouped(build, (0, 0), (1, 1))
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    recompute.mark([calls[2]], 0)
    with pytest.raises(recompute.NotRegroupable, match="interleaved"):
        recompute.regroup(gm)
