"""What needs no rewriting is named."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from varlen_inductor.patterns.attention import find_candidates
from varlen_inductor.patterns.normalise import normalise

Tensor = torch.Tensor


def reasons(function: Any, *args: Any) -> list[str]:
    """Of the graph that Dynamo captures; it is not run."""
    found: list[str] = []

    class Captured(Exception):
        pass

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        candidates, rejected = find_candidates(normalise(gm))
        assert not candidates
        found.extend(r.reason for r in rejected)
        raise Captured

    try:
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    except torch._dynamo.exc.BackendCompilerFailed as failure:
        assert isinstance(failure.inner_exception, Captured), failure.inner_exception  # noqa: PT017
    return found


def test_flex_attention() -> None:
    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    x = torch.randn(1, 2, 128, 16)
    mask = create_block_mask(causal, None, None, 128, 128, device="cpu")
    assert reasons(lambda x: flex_attention(x, x, x, block_mask=mask), x) == [
        "it is flex_attention, whose block mask already skips what is hidden"
    ]


def test_fused_layer_without_a_mask() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    with torch.no_grad():
        assert reasons(layer, torch.randn(2, 4, 16)) == [
            "it is a fused layer without a mask, so nothing in it is known to be padding"
        ]
