"""Graphs of products, traced as Inductor has them after autograd, and the check that joining products changes nothing in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from varlen_inductor.lowering.joined_products import join_products

aten, ops = torch.ops.aten, torch.ops.varlen_inductor
T, E, H = 96, 16, 2
LONGEST = 64
OFFSETS = torch.tensor([0, 29, 29, 93, 96], dtype=torch.int32)


def traced(function: Callable[..., Any], operands: list[Tensor], packed: bool = True, user: bool = True) -> fx.GraphModule:
    """The graph of ``function``, the number of rows a symbol if they are packed; ``user``: its results are for the user."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(x: Tensor) -> Tensor:
        sizes = [DimDynamic.DYNAMIC if n == T and packed else DimDynamic.STATIC for n in x.shape]
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes))

    gm = make_fx(function)(*map(fake, operands))
    gm.graph.eliminate_dead_code()
    if not user:
        gm.graph.output_node().meta["user_visible_output_idxs"] = []
    return gm


def lines(gm: fx.GraphModule) -> str:
    def name(target: Any) -> str:
        return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__

    return "\n".join(f"{n.name} = {name(n.target)}{n.args[:5]}" for n in gm.graph.nodes if n.op == "call_function")


def products(gm: fx.GraphModule) -> int:
    return sum(node.target in (aten.mm.default, aten.addmm.default) for node in gm.graph.nodes)


def check(gm: fx.GraphModule, operands: list[Tensor], groups: int, left: int) -> None:
    before, wanted = lines(gm), gm(*operands)
    assert join_products(gm.graph, "cpu") == groups
    gm.graph.lint()
    gm.recompile()
    assert products(gm) == left
    if not groups:
        assert lines(gm) == before
    torch.testing.assert_close(gm(*operands), wanted)
