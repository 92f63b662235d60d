"""Wide linears with an odd number of outputs are padded to aligned rows, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from varlen_inductor.ops import packing as _  # noqa: F401  (registers the operators)
from varlen_inductor.patterns import align

aten = torch.ops.aten


def head(
    outputs: int,
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    packed: bool = True,
    reader: Callable[[fx.Graph, fx.Node], fx.Node] | None = None,
) -> fx.GraphModule:
    """A linear with so many outputs on packed rows, read by a softmax unless said otherwise."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    b = graph.placeholder("b") if bias else None
    with FakeTensorMode():
        w.meta["val"] = torch.empty(outputs, 4, device=device, dtype=dtype)
        if not packed:
            x.meta["val"] = torch.empty(8, 4, device=device, dtype=dtype)
    y = graph.call_function(aten.linear.default, (x, w, b))
    graph.output(graph.call_function(aten.softmax.int, (y, -1)) if reader is None else reader(graph, y))
    return fx.GraphModule(nn.Module(), graph)


def view_of(packet: torch._ops.OpOverload, *args: object) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    """A reader that views what may be the linear's own memory."""
    return lambda graph, y: graph.call_function(aten.view.default, (graph.call_function(packet, (y, *args)), [-1]))


def calls_of(gm: fx.GraphModule) -> str:
    return "\n".join(f"{n.name} = {n.target}{n.args}" for n in gm.graph.nodes if n.op == "call_function")


def test_graph() -> None:
    gm = head(30522)
    assert align.align_wide_linears(gm) == 1
    assert_expected_inline(
        calls_of(gm),
        """\
constant_pad_nd_default = aten.constant_pad_nd.default(w, [0, 0, 0, 6], 0.0)
constant_pad_nd_default_1 = aten.constant_pad_nd.default(b, [0, 6], 0.0)
linear_default_1 = aten.linear.default(x, constant_pad_nd_default, constant_pad_nd_default_1)
slice_tensor = aten.slice.Tensor(linear_default_1, -1, 0, 30522)
softmax_int = aten.softmax.int(slice_tensor, -1)""",
    )


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(bias: bool) -> None:
    gm = head(1027, bias=bias)
    generator = torch.Generator().manual_seed(1)
    shapes = [(8, 4), (1027, 4), *([(1027,)] if bias else [])]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    before = gm(*inputs)
    cotangent = torch.randn(before.shape, generator=generator, dtype=torch.float64)
    expected = [before, *torch.autograd.grad(before, inputs, cotangent)]
    assert align.align_wide_linears(gm) == 1
    after = gm(*inputs)
    for got, wanted in zip([after, *torch.autograd.grad(after, inputs, cotangent)], expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "gm",
    [
        pytest.param(head(30528), id="aligned"),
        pytest.param(head(257), id="narrow"),
        pytest.param(head(30522, device="cpu"), id="cpu"),
        pytest.param(head(30522, dtype=torch.float32), id="float32"),
        pytest.param(head(30522, packed=False), id="not packed"),
        pytest.param(head(30522, reader=lambda graph, y: y), id="an output"),
        pytest.param(head(30522, reader=lambda graph, y: graph.call_function(aten.view.default, (y, [-1]))), id="a view"),
        pytest.param(head(30522, reader=view_of(aten.to.dtype, torch.bfloat16)), id="a view of a cast to the same"),
        pytest.param(head(30522, reader=view_of(aten.reshape.default, [8, 30522])), id="a view of a reshape"),
    ],
)
def test_left_alone(gm: fx.GraphModule) -> None:
    before = calls_of(gm)
    assert align.align_wide_linears(gm) == 0
    assert calls_of(gm) == before
