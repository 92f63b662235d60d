"""What `PackedProgram` does when the packed body cannot be compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from varlen_inductor import config, report, runtime
from varlen_inductor.backend import varlen_inductor as backend


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.out(y.transpose(1, 2).flatten(-2))


def broken_body(gm: torch.fx.GraphModule, domains: int, round_tokens: int):  # type: ignore[no-untyped-def]
    def graph(*args):  # type: ignore[no-untyped-def]
        torch._dynamo.graph_break()
        return gm(*args)

    return graph


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 16, 8), torch.arange(16)[None] < torch.tensor([16, 3, 5, 2])[:, None]


def test_a_body_that_does_not_compile_runs_padded(
    monkeypatch: pytest.MonkeyPatch, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    monkeypatch.setattr(runtime, "_with_whole_chunks", broken_body)
    model = Attention()
    with config.patch(inner_backend="eager", round_tokens=8):
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            torch.testing.assert_close(compiled(*batch), model(*batch))
    assert "graph_break" in report.recent()[-1].error


def test_strict_raises(monkeypatch: pytest.MonkeyPatch, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    monkeypatch.setattr(runtime, "_with_whole_chunks", broken_body)
    with config.patch(inner_backend="eager", round_tokens=8, strict=True):
        compiled = torch.compile(Attention(), backend=backend)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(*batch)
