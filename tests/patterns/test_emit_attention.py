"""The three ways in which the queries of an attention reach the varlen call, and the plan that each takes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from varlen_inductor import config, driver
from varlen_inductor.backend import varlen_inductor as backend


class Attention(nn.Module):
    """Self-attention under a mask that is either computed from lengths (a prefix by construction) or given."""

    def __init__(self, *, from_lengths: bool, causal: bool = False, pool: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.from_lengths, self.causal, self.pool = from_lengths, causal, pool

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        position = torch.arange(x.shape[1])
        valid = position[None] < mask.sum(1)[:, None] if self.from_lengths else mask
        visible = valid[:, None, None, :]
        if self.causal:
            visible = visible & (position[None] <= position[:, None])
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(-2))
        return y.mean(1) if self.pool else y


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The names of our operators in the graph that was made last."""
    names: Counter[str] = Counter()
    rewrite_graph = driver.rewrite_graph

    def spy(*args, **kwargs):  # type: ignore[no-untyped-def]
        made = rewrite_graph(*args, **kwargs)
        names.clear()
        if made.gm is not None:
            targets = [n.target for n in made.gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
            names.update(t._schema.name.split("::")[1] for t in targets if t.namespace == "varlen_inductor")
        return made

    monkeypatch.setattr(driver, "rewrite_graph", spy)
    return names


RIGHT = torch.arange(16)[None] < torch.tensor([16, 5, 0, 1])[:, None]
HOLES = RIGHT & (torch.arange(16) % 3 != 1)


def check(model: nn.Module, mask: torch.Tensor, padded_are_zero: bool) -> None:
    x = torch.randn(4, 16, 8, requires_grad=True)
    with config.patch(packing="attention", inner_backend="eager", strict=True):
        ours, eager = torch.compile(model, backend=backend)(x, mask), model(x, mask)
    weight = torch.randn_like(eager)
    if padded_are_zero:
        assert (ours[~mask] == 0).all()
        weight = weight * mask[..., None]
    torch.testing.assert_close(ours * (weight != 0), eager * (weight != 0))
    inputs = [x, *model.parameters()]
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), inputs), torch.autograd.grad((eager * weight).sum(), inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_a_prefix_stay_where_they_are(emitted: Counter[str], causal: bool) -> None:
    check(Attention(from_lengths=True, causal=causal), RIGHT, padded_are_zero=True)
    assert emitted == {"plan_in_place": 1, "varlen_attn": 1, "unpack": 1}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [RIGHT, HOLES], ids=["right", "holes"])
def test_any_other_mask_packs_query_key_and_value(emitted: Counter[str], mask: torch.Tensor, causal: bool) -> None:
    check(Attention(from_lengths=False, causal=causal), mask, padded_are_zero=True)
    assert emitted == {"plan_static": 1, "pack": 3, "varlen_attn": 1, "unpack": 1}


@pytest.mark.parametrize("from_lengths", [False, True])
def test_where_padded_rows_are_read_all_queries_are_kept(emitted: Counter[str], from_lengths: bool) -> None:
    check(Attention(from_lengths=from_lengths, pool=True), RIGHT, padded_are_zero=False)
    assert emitted == {"plan_static": 1, "pack": 2, "row_offsets": 1, "varlen_attn": 1}
