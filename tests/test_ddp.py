"""DistributedDataParallel in one process over gloo: one rewrite for the whole graph, one compiled piece per bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, fx, nn
from torch.nn.parallel import DistributedDataParallel

import varlen_inductor
from helpers import stub_driver
from varlen_inductor import backend, config, explain

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this build of PyTorch has no gloo"
)
WIDTH = 640  # three linears of this width are more than one bucket of a megabyte


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Driver:
    """Compiles each graph at once, or later by a nested compile, and notes how large it was."""

    def __init__(self, nested: bool) -> None:
        self.nested = nested
        self.linears: list[int] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any, inner: backend.InnerCompiler, route: str) -> Any:
        self.linears.append(sum("linear" in str(node.target) for node in gm.graph.nodes if node.op == "call_function"))
        if not self.nested:
            return inner.compile(gm, inputs)

        def body(*args: Any) -> Any:
            return gm(*args)

        compiled = inner.nested(body)
        return lambda *args: compiled(*args)


class Network(nn.Module):
    # Not an `nn.Sequential`: Dynamo does not start a graph in PyTorch's own modules, and DDP itself is none of its concern.
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            x = linear(x).relu()
        return x


def gradients(model: Any, x: torch.Tensor, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    for parameter in parameters:
        parameter.grad = None
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("route", ["backend", "enable"])
def test_passes_see_the_whole_graph_and_the_result_is_cut(nested: bool, route: str) -> None:
    model, x = Network(), torch.randn(2, WIDTH)
    parameters = list(model.parameters())
    driver = Driver(nested)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
    with stub_driver(driver), config.patch(inner_backend="aot_eager", strict=True):
        try:
            if route == "enable":
                varlen_inductor.enable()
            compiled = torch.compile(wrapped, backend="inductor" if route == "enable" else "varlen_inductor")
            got = gradients(compiled, x, parameters)
        finally:
            varlen_inductor.disable()
    assert driver.linears == [3]
    assert torch._dynamo.utils.counters["aot_autograd"]["ok"] > 1
    for ours, eager in zip(got, gradients(model, x, parameters), strict=True):
        torch.testing.assert_close(ours, eager)


def test_compiled_inside_ddp() -> None:
    model, x = Network(), torch.randn(2, WIDTH)
    driver = Driver(nested=True)
    with stub_driver(driver), config.patch(inner_backend="aot_eager", strict=True):
        wrapped = DistributedDataParallel(torch.compile(model, backend="varlen_inductor"), bucket_cap_mb=1)
        got = gradients(wrapped, x, list(model.parameters()))
    assert driver.linears == [3]
    assert torch._dynamo.utils.counters["aot_autograd"]["ok"] > 1
    for ours, eager in zip(got, gradients(model, x, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, eager)


def test_other_backends_are_cut_as_before() -> None:
    sizes: list[int] = []

    def other(gm: fx.GraphModule, inputs: Any) -> Any:
        sizes.append(sum("linear" in str(node.target) for node in gm.graph.nodes if node.op == "call_function"))
        return gm.forward

    wrapped = DistributedDataParallel(Network(), bucket_cap_mb=1)
    torch.compile(wrapped, backend=other)(torch.randn(2, WIDTH))
    assert len(sizes) > 1


def test_explain_does_not_upset_the_reducer() -> None:
    model, x = Network(), torch.randn(2, WIDTH)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
    with stub_driver():
        explain(wrapped, x)
    gradients(wrapped, x, list(model.parameters()))
