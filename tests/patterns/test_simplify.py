"""What does nothing goes, what somebody can tell stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.patterns.zoo import Captured, captured, targets

aten = torch.ops.aten


def test_identities_are_dropped() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x[:].to(torch.float32).expand(4, 4).view(4, 4) + F.dropout(x, 0.5, training=False)).detach() * 2

    assert targets(captured(function, x=torch.randn(4, 4)).graph) == ["aten.add.Tensor", "aten.mul.Tensor"]


def test_returned_aliases_are_kept() -> None:
    """The caller can tell an input from a view of it."""
    backend = Captured()
    x = torch.randn(4, 4)
    y, _z = torch.compile(lambda x: (x[:], x + 1), backend=backend, fullgraph=True)(x)
    assert y is not x
    assert y.data_ptr() == x.data_ptr()


def test_unused_effects_are_kept() -> None:
    norm = nn.BatchNorm1d(4)

    def function(x: torch.Tensor) -> torch.Tensor:
        norm(x)
        return x + 1

    x = torch.randn(8, 4)
    torch.compile(function, backend=Captured(), fullgraph=True)(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(0))


def test_a_copy_that_is_needed() -> None:
    """Dropout in inference is traced as a copy: it stays where the memory behind it is written."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = F.dropout(x, 0.5, training=False)
        x.add_(1)
        return y * x

    assert "aten.dropout.default" in targets(captured(function, x=torch.randn(4, 4)).graph)


def test_numbers_are_written_into_the_graph() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, torch.tensor(float("-inf"))) * torch.tensor(2) + torch.tensor([1.0, 2.0])

    gm = captured(function, x=torch.randn(2, 2))
    filled = [(n.args[1], n.meta["val"].dtype) for n in gm.graph.nodes if n.target is aten.full.default]
    assert filled == [(float("-inf"), torch.float32), (2, torch.int64)]
    assert [n.target for n in gm.graph.nodes if n.op == "get_attr"] == ["_tensor_constant2"]
    assert [name for name, _ in gm.named_buffers()] == ["_tensor_constant2"]
