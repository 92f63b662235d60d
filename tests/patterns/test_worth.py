"""From which size of batch on packing is taken to pay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from varlen_inductor.patterns import worth
from varlen_inductor.patterns.regions import Choice

aten = torch.ops.aten


class StandIn:
    """What `Choice` and its regions are to this module."""

    def __init__(self, nodes: list[fx.Node]) -> None:
        self.nodes = nodes
        self.regions = [self]


def choice(*weights: tuple[int, int], device: str = "cuda") -> Choice:
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = []
    for shape in weights:
        w = graph.placeholder("w")
        with FakeTensorMode():
            w.meta["val"] = torch.empty(shape, device=device, dtype=torch.bfloat16)
        nodes.append(graph.call_function(aten.linear.default, (x, w)))
    nodes.append(graph.call_function(aten.relu.default, (x,)))
    return StandIn(nodes)  # type: ignore[return-value]


def test_larger_linears_pay_earlier() -> None:
    small, large = (worth.smallest_batch(choice((n, n), (4 * n, n)), False) for n in (256, 1024))
    assert small == math.ceil(worth.LEAST_WORK / (2.5 * 256**2))
    assert large == math.ceil(worth.LEAST_WORK / (2.5 * 1024**2))


@pytest.mark.parametrize(("width", "positions"), [(768, 6782), (4096, 239)])
def test_encoders(width: int, positions: int) -> None:
    """One projection to query, key and value, one back, and two of a feed-forward of four times the width."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    assert worth.smallest_batch(choice(*shapes), False) == positions
    assert worth.smallest_batch(choice(*shapes), True) < positions / 3


@pytest.mark.parametrize("op", [aten.addmm.default, aten.mm.default, aten.matmul.default])
def test_rows_of_tokens_are_no_weight(op: torch._ops.OpOverload) -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("bias", "x", "w")]
    with FakeTensorMode():
        for node, shape in zip(nodes, [(32,), (4096, 16), (16, 32)]):
            node.meta["val"] = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    linear = graph.call_function(op, tuple(nodes if op is aten.addmm.default else nodes[1:]))
    assert worth.smallest_batch(StandIn([linear]), False) == math.ceil(worth.LEAST_WORK / 512)  # type: ignore[arg-type]


def test_cpu_packs_always() -> None:
    assert worth.smallest_batch(choice((256, 256), device="cpu"), False) == 0
    assert worth.smallest_batch(choice(), False) == 0


def test_attention_alone_is_not_worth_a_plan() -> None:
    assert worth.worth_packing(choice((4, 4)))
    assert not worth.worth_packing(choice())
