"""The fused inference operators, written out, compute what they computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.patterns import zoo
from tests.patterns.zoo import Captured, targets

aten = torch.ops.aten


@pytest.mark.parametrize("kind", ["boolean", "float", "no_valid_key", "both"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_fused_layers_with_a_mask_are_written_out(kind: str, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first, activation="gelu").eval()
    x, hidden = torch.randn(3, 8, 16), zoo.padding() == 0
    src_mask = torch.triu(torch.ones(8, 8, dtype=torch.bool), 1) if kind == "both" else None
    if kind == "float":
        hidden = torch.zeros(3, 8).masked_fill(hidden, float("-inf"))
    elif kind == "no_valid_key":
        hidden[1] = True
    backend = Captured()
    with torch.no_grad():
        expected = layer(x, src_mask=src_mask, src_key_padding_mask=hidden)
        result = torch.compile(layer, backend=backend, fullgraph=True)(x, src_mask=src_mask, src_key_padding_mask=hidden)
    torch.testing.assert_close(result, expected, equal_nan=True)
    assert "aten._transformer_encoder_layer_fwd.default" in [str(n.target) for n in reference_targets(backend)]
    assert "aten._transformer_encoder_layer_fwd.default" not in targets(backend.graph)
    assert "aten.softmax.int" in targets(backend.graph)


def reference_targets(backend: Captured) -> list[torch.fx.Node]:
    """The Dynamo graph's nodes, with the fused operators under the names that ATen gives them."""
    nodes = list(backend.before[0].graph.nodes)
    for node in nodes:
        name = getattr(node.target, "__name__", "")
        if name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
            node.target = getattr(aten, name).default
    return nodes


def test_fused_layers_without_a_mask_stay() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    backend = Captured()
    with torch.no_grad():
        torch.compile(layer, backend=backend, fullgraph=True)(torch.randn(3, 8, 16))
    assert targets(backend.graph) == ["aten._transformer_encoder_layer_fwd.default"]


@pytest.mark.parametrize("average", [True, False])
def test_fused_multi_head_attention(average: bool) -> None:
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x, hidden = torch.randn(3, 8, 16), zoo.padding() == 0

    def function(x: torch.Tensor, hidden: torch.Tensor) -> Any:
        return module(x, x, x, key_padding_mask=hidden, average_attn_weights=average)

    backend = Captured()
    with torch.no_grad():
        expected = function(x, hidden)
        result = torch.compile(function, backend=backend, fullgraph=True)(x, hidden)
    torch.testing.assert_close(result, expected)
    assert "aten.softmax.int" in targets(backend.graph)
