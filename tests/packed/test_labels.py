"""Which facts about labels a plan leaves to the kernel that counts tokens. (What becomes of them: `test_models`.)"""

from __future__ import annotations

import pytest
import torch

from varlen_inductor import runtime


@pytest.mark.parametrize("case", ["flat", "as given", "first of two", "another mask", "another domain", "a fraction", "any"])
def test_which_labels_are_left_to_the_kernel(case: str) -> None:
    aten, graph = torch.ops.aten, torch.fx.Graph()
    mask, other, labels = (graph.placeholder(name) for name in ("mask", "other", "labels"))

    def fact(valid: torch.fx.Node, ignored: float = -100) -> torch.fx.Node:
        flat = labels if case == "as given" else graph.call_function(aten.reshape.default, (labels, [-1]))
        equal = graph.call_function(aten.eq.Scalar, (flat, ignored))
        either = graph.call_function(aten.logical_or.default, (equal, graph.call_function(aten.reshape.default, (valid, [-1]))))
        return graph.call_function((aten.any if case == "any" else aten.all).default, (either,))

    if case == "first of two":
        facts = [graph.call_function(aten.all.default, (other,)), fact(mask), fact(mask, 3)]
    else:
        facts = [fact(mask if case not in ("another mask", "another domain") else other, 0.5 if case == "a fraction" else -100)]
    masks = [mask, other] if case == "another domain" else [mask]
    graph.output((*masks, *facts))
    gm = torch.fx.GraphModule({}, graph)
    given = torch.randint(-101, -99, (12,) if case == "as given" else (3, 4))
    inputs = (torch.rand(3, 4) < 0.5, torch.rand(3, 4) < 0.5, given)
    before = list(gm(*inputs))
    found = runtime._leave_labels_to_the_kernel(gm, len(masks))
    gm.graph.lint()
    after = list(gm(*inputs))
    if case in ("flat", "as given", "first of two"):
        assert found == -100
        assert after.pop() is given
        before.pop(2 if case == "first of two" else 1)
    else:
        assert found is None
    assert len(after) == len(before)
    assert all(map(torch.equal, after, before))
