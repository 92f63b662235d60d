"""Which numbers are two that lie side by side, and which kernels are asked for that take them.

What is made of them: `test_kernels_of_packed_graphs`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from varlen_inductor.lowering import attention
from varlen_inductor.lowering.drawn_seeds import read_seeds_in_place
from varlen_inductor.ops.backends import cpu
from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.problem import Layout, Rule


def test_each_number_is_looked_for_where_it_is() -> None:
    """Only two that lie side by side, in this order, are read in place."""
    with FakeTensorMode():
        val = torch.empty(6, dtype=torch.int64)
    graph = torch.fx.Graph()
    seeds = graph.placeholder("seeds")
    others = graph.placeholder("others")
    seeds.meta["val"] = others.meta["val"] = val

    def pair(*places: tuple[torch.fx.Node, int]) -> torch.fx.Node:
        parts = []
        for memory, place in places:
            one = graph.call_function(torch.ops.prims.inductor_lookup_seed.default, (memory, place))
            one.meta["val"] = val[0]
            parts.append(graph.call_function(torch.ops.aten.unsqueeze.default, (one, 0)))
            parts[-1].meta["val"] = val[:1]
        node = graph.call_function(torch.ops.aten.cat.default, (parts,))
        node.meta["val"] = val[: len(places)]
        return node

    read = [pair((seeds, 1), (seeds, 2)), pair((others, 4), (others, 5))]
    kept = [pair((seeds, 1), (seeds, 3)), pair((seeds, 2), (seeds, 1)), pair((seeds, 1), (others, 2)), pair((seeds, 0))]
    kept.append(pair((seeds, 0), (seeds, 1), (seeds, 2)))
    graph.output((*read, *kept))
    numbers = [torch.arange(6), torch.arange(10, 16)]
    module = torch.fx.GraphModule({}, graph)
    expected = module(*numbers)
    assert read_seeds_in_place(graph) == 2
    graph.lint()
    module.recompile()
    for found, wanted in zip(module(*numbers), expected, strict=True):
        assert torch.equal(found, wanted)
    targets = [node.target for node in graph.output_node().args[0]]
    assert targets == [torch.ops.aten.slice.Tensor] * 2 + [torch.ops.aten.cat.default] * 5


@pytest.mark.parametrize("case", ["one takes them", "two would", "none does", "no dropout", "a budget of 1", "another compiler"])
def test_who_takes_seeds_is_asked_for_where_they_must_be_kept(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody else: a backward asks without seeds unless it has some, and must find the kernel of its forward."""
    first, second = (dataclasses.replace(cpu.BACKEND, name=name, takes_seeds=True) for name in ("first", "second"))

    def chosen(query: Any, key: Any, value: Any, layout: Layout, rule: Rule, kernels: str | None) -> tuple[Backend, ...]:
        if layout.seeds is None:
            return cpu.BACKEND, cpu.BACKEND
        if case == "none does":
            raise RuntimeError("no kernel")
        return first, second if case == "two would" else first

    monkeypatch.setattr(attention, "_chosen", chosen)
    x, ends = torch.zeros(4, 1, 8), torch.tensor([0, 4], dtype=torch.int32)
    rule = Rule(1.0, dropout_p=0.0 if case == "no dropout" else 0.5)
    with torch._functorch.config.patch(activation_memory_budget=1.0 if case == "a budget of 1" else 0.5):
        found = attention._chosen_forward(x, x, x, Layout(ends, ends, 4, 4), rule, None, case != "another compiler")
    assert found == ((first, first) if case == "one takes them" else (cpu.BACKEND, cpu.BACKEND))
