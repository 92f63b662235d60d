"""What broadcasts several tensors at once is written as one `expand` for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.patterns.zoo import Captured, assert_same, targets


class Model(nn.Module):
    """`function(h, y)`, where `h` (2, 3, 4) has a gradient."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(self.linear(x), y)


def places(y: Tensor) -> Tensor:
    return y.abs().long().clamp(max=1)


WRITTEN: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[int, ...], list[str]]] = {
    "equal shapes": (lambda h, y: F.mse_loss(h, y), (2, 3, 4), []),
    "one expands": (lambda h, y: torch.stack(torch.broadcast_tensors(h, y)), (3, 1), ["aten.expand.default"]),
    "both expand": (lambda h, y: torch.stack(torch.broadcast_tensors(h[:, :1], y)), (3, 1), ["aten.expand.default"] * 2),
    "more dimensions": (lambda h, y: torch.stack(torch.broadcast_tensors(h, y)), (5, 1, 1, 1), ["aten.expand.default"] * 2),
    "one is used": (lambda h, y: torch.broadcast_tensors(h, y)[1] * h, (3, 1), ["aten.expand.default"]),
    "taken along": (lambda h, y: torch.take_along_dim(h, places(y), 1), (1, 2, 1), ["aten.expand.default", "aten.gather.default"]),
    "taken along the last": (lambda h, y: h.take_along_dim(places(y), -1), (2, 3, 2), ["aten.gather.default"]),
    "taken from one": (
        lambda h, y: h[:1].take_along_dim(places(y), -1), (2, 3, 2), ["aten.expand.default", "aten.gather.default"],
    ),
    "in a checkpoint": (
        lambda h, y: checkpoint(lambda a, b: torch.broadcast_tensors(a, b)[1] * a, h, y, use_reentrant=False),
        (3, 1), ["aten.expand.default"],
    ),
    "without gradient": (lambda h, y: _without_gradient(h, y), (3, 1), ["aten.expand.default"]),
}  # fmt: skip


def _without_gradient(h: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        a, b = torch.broadcast_tensors(h, y)
    return h * a + b


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", WRITTEN)
def test_written_apart(name: str, dynamic: bool) -> None:
    function, shape, expected = WRITTEN[name]
    backend = Captured()
    assert_same(Model(function), {"x": torch.randn(2, 3, 4), "y": torch.randn(shape)}, backend, dynamic=dynamic)
    found = targets(backend.graph)
    assert [t for t in found if t in ("aten.expand.default", "aten.gather.default")] == expected
    assert not [t for t in found if "broadcast" in t or "take_along" in t]


def test_what_is_flattened_is_left() -> None:
    backend = Captured()
    assert_same(Model(lambda h, y: torch.take_along_dim(h, places(y))), {"x": torch.randn(2, 3, 4), "y": torch.randn(5)}, backend)
    assert "aten.take_along_dim.default" in targets(backend.graph)


def test_returned_views_are_views() -> None:
    """The caller can tell that the results share memory with the inputs."""
    x, y = torch.randn(2, 3), torch.randn(3)
    one, two = torch.compile(torch.broadcast_tensors, backend=Captured(), fullgraph=True)(x, y)
    assert one.data_ptr() == x.data_ptr()
    assert two.data_ptr() == y.data_ptr()
    assert two.stride() == (0, 1)
