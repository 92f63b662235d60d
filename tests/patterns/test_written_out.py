"""Tensors written out in the model, on a device: no constant is made while recording."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from varlen_inductor.patterns.normalise import normalise


def recorded(data: Any, **options: Any) -> fx.GraphModule:
    """`x + torch.tensor(data)`, where x is on a device that this machine need not have."""
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
    graph = fx.Graph()
    given = graph.placeholder("x")
    given.meta["example_value"] = x
    constant = graph.call_function(torch.tensor, (data,), options)
    graph.output((graph.call_function(torch.add, (given, constant)),))
    return normalise(fx.GraphModule({}, graph))


@pytest.mark.parametrize(
    ("data", "dtype", "expected"),
    [(0.5, None, torch.float32), (3, None, torch.int64), (True, None, torch.bool), (1, torch.float16, torch.float16)],
)
def test_numbers_are_filled_in(data: Any, dtype: torch.dtype | None, expected: torch.dtype) -> None:
    options = {} if dtype is None else {"dtype": dtype}
    gm = recorded(data, device="cuda", **options)
    (full,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
    assert full.args == ([], data)
    assert full.meta["val"].dtype == expected == torch.tensor(data, dtype=dtype).dtype
    assert full.meta["val"].device.type == "cuda"
    assert not gm.graph.find_nodes(op="get_attr", target="_tensor_constant0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch follows the constant to the device")
def test_lists_are_constants_of_the_host_that_are_moved() -> None:
    gm = recorded([1.0, 2.0, 3.0], device="cuda")
    assert torch.equal(gm._tensor_constant0, torch.tensor([1.0, 2.0, 3.0]))
    (moved,) = (n for n in gm.graph.nodes if str(n.target).startswith("aten.to"))
    assert moved.meta["val"].device.type == "cuda"
    (given, *_) = gm.graph.nodes
    assert all(n.meta["val"].fake_mode is given.meta["val"].fake_mode for n in gm.graph.nodes if n.op == "call_function")
