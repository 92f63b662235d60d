"""The attention-only form through Inductor, whose graphs hold the plan: as operators, since Python runs."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from helpers import MaskedAttention
from varlen_inductor import _compat
from varlen_inductor.backend import varlen_inductor as backend

B, S, E = 3, 12, 16
LENGTHS = torch.tensor([12, 5, 1])


class Prefix(MaskedAttention):
    """Valid positions known to come first, so that no row need be moved."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return super().forward(x, torch.arange(x.shape[1]) < lengths[:, None])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["mask", "prefix"])
def test_attention_only(kind: str, train: bool) -> None:
    model = MaskedAttention(E) if kind == "mask" else Prefix(E)
    mask = torch.arange(S) < LENGTHS[:, None]
    given = mask if kind == "mask" else LENGTHS
    x = torch.randn(B, S, E)
    compiled = torch.compile(model, backend=backend, options={"varlen.packing": "attention", "varlen.strict": True})

    def step(function: torch.nn.Module) -> list[torch.Tensor]:
        with torch.set_grad_enabled(train):
            out = function(x, given)
        if not train:
            return [out[mask]]
        (out * mask[..., None]).sum().backward()
        found = [out[mask].detach(), *(p.grad for p in model.parameters())]
        model.zero_grad()
        return found

    found, code = run_and_get_code(step, compiled)
    for ours, theirs in zip(found, step(model), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert _compat.counters()["attention_rewritten"] == 1
    assert ("varlen_inductor.plan_static" in "".join(code)) == (kind == "mask")
