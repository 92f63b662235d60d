"""Whose padded rows are needed, and by what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from analysed import B, E, H, S, analysed, attend, batch
from torch import Tensor

from varlen_inductor.patterns.demand import NOTHING, Demand, Read
from varlen_inductor.patterns.oprules import op_name

LABELS = torch.zeros(B, S, dtype=torch.long)


def _last(v: Tensor, count: int = 1) -> Tensor:
    """The last valid position of each row, ``count`` times: (B, count, E)."""
    return (v.sum(1) - 1)[:, None, None].expand(-1, count, E)


def demand_on_attention(tail: Callable[..., Any], *more: Tensor, **options: Any) -> Demand:
    """What ``tail(y, valid, *more)`` demands of the padded rows of an attention's result ``y``."""
    x, valid = batch()
    found = analysed(lambda x, v, *rest: tail(attend(x, v), v, *rest), x, valid, *more, **options)
    return found.analysis.of(found.node("attention_site"))


NOTHING_NEEDED: dict[str, Callable[..., Any]] = {
    "an output": lambda y, v: y,
    "row-wise": lambda y, v: (y * 2).softmax(-1).sum(-1, keepdim=True) + y.new_ones(1),
    "masked sum": lambda y, v: (y * v[..., None]).sum(1),
    "only its shape": lambda y, v: torch.zeros_like(y).sum(1) + v.sum(),
    "only the shape of a part": lambda y, v: torch.zeros_like(y[:, 0]) + v.sum(),
    "keys and values": lambda y, v: F.scaled_dot_product_attention(
        torch.ones(B, 1, 4, E), y[:, None], y[:, None] * 2, attn_mask=v[:, None, None]
    ),
    "never used": lambda y, v: (y.mean(1), y * v[..., None])[1],
    "overwritten": lambda y, v: torch.where(v[..., None], y, 0.0).amax(1),
    "a loss of each element": lambda y, v: (F.l1_loss(y, y * 2, reduction="none") * v[..., None]).sum(),
    "a loss of each position": lambda y, v: (F.cross_entropy(y.transpose(1, 2), LABELS, reduction="none") * v).sum(),
    "a lookup": lambda y, v: (torch.ones(9, E)[y.long().amax(-1).clamp(0, 8)] * v[..., None]).sum(),
    "a gate": lambda y, v: (F.glu(y) * v[..., None]).sum(),
    "weighed by zero": lambda y, v: torch.bmm(v.to(y.dtype)[:, None], y),
}


@pytest.mark.parametrize("name", NOTHING_NEEDED)
def test_nothing(name: str) -> None:
    assert demand_on_attention(NOTHING_NEEDED[name]) == NOTHING


LEAKS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "mean": (lambda y, v: y.mean(1), "mean", "mixes rows"),
    "over the batch": (lambda y, v: y.sum(0), "sum", "mixes rows"),
    "through a chain": (lambda y, v: (y.exp() + 1).transpose(0, 1).amax(0), "amax", "mixes rows"),
    "convolution": (lambda y, v: F.conv1d(y.transpose(1, 2), torch.ones(E, E, 2)), "conv1d", "mixes rows"),
    "unknown": (lambda y, v: torch.fft.fft(y).real, "fft_fft", "is not known to work row by row"),
    "scores": (lambda y, v: y @ y.transpose(1, 2), "matmul", "does not keep one row per token"),
    "opposite mask": (lambda y, v: (y * (~v)[..., None]).sum(1), "sum", "mixes rows"),
    "positions last": (lambda y, v: y.transpose(1, 2), "output", "last axis is the token axis"),
    "scores of positions": (lambda y, v: y.sum(-1), "output", "last axis is the token axis"),
    "moved": (lambda y, v: y + torch.cat([y[:, 1:], y[:, :1]], 1), "slice", "mixes rows"),
    "a long slice": (lambda y, v: y[:, :5].sum(1), "slice", "mixes rows"),
    "every second": (lambda y, v: y[:, ::2].sum(1), "slice", "mixes rows"),
    "several gathered": (lambda y, v: y.gather(1, _last(v, 2)), "gather", "mixes rows"),
    "gathered for each feature": (lambda y, v: y.gather(1, v[:, :1, None] * torch.arange(E) % S), "gather", "mixes rows"),
    "gathered from the batch": (lambda y, v: y.gather(0, torch.zeros(1, S, E).long()), "gather", "mixes rows"),
    "gathered at what it holds": (lambda y, v: y.gather(1, (y[:, :1, :1].long() * 0).expand(-1, -1, E)), "gather", "mixes rows"),
    "indexed at what it holds": (lambda y, v: y[torch.arange(B), y[:, 0, 0].long() * 0], "index", "is not known"),
    "looked up": (lambda y, v: y.flatten(0, 1)[LABELS], "index", "mixes rows"),
    "a gate of positions": (lambda y, v: F.glu(y, 1), "glu", "mixes rows"),
    "a reduced loss": (lambda y, v: F.mse_loss(y, y * 0), "mean", "mixes rows"),
    "a row of the batch": (lambda y, v: y[0], "select", "mixes rows"),
    "keys without a mask": (lambda y, v: F.scaled_dot_product_attention(y, y, y), "scaled_dot_product_attention", "mixes rows"),
    "weights of other rows": (lambda y, v: v.to(y.dtype) @ y, "matmul", "mixes rows"),
    "probabilities": (lambda y, v: F.cross_entropy(y.flatten(0, 1), torch.ones(B * S, E) / E), "cross_entropy_loss", "mixes rows"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_leaks(name: str) -> None:
    tail, operator, why = LEAKS[name]
    found = demand_on_attention(tail)
    assert found.leak is not None
    assert ("output" if found.leak.op == "output" else op_name(found.leak)) == operator
    assert why in found.why


READS: dict[str, tuple[Callable[..., Any], tuple[tuple[str, int], ...]]] = {
    "first": (lambda y, v: y[:, 0], (("position", 0),)),
    "last": (lambda y, v: y[:, -1], (("position", -1),)),
    "two": (lambda y, v: y[:, :2], (("position", 0), ("position", 1))),
    "from the end": (lambda y, v: y[:, -2:] * 2, (("position", -2), ("position", -1))),
    "heads": (lambda y, v: y.view(B, S, H, -1).transpose(1, 2)[:, :, 3], (("position", 3),)),
    "by index": (lambda y, v: y[torch.arange(B), v.sum(1) - 1], (("index", 0),)),
    "gathered": (lambda y, v: y.gather(1, _last(v)), (("gather", 0),)),
    "gathered along heads": (
        lambda y, v: y.view(B, S, H, -1).transpose(1, 2).gather(2, _last(v)[..., :1, None].expand(-1, H, 1, E // H)),
        (("gather", 0),),
    ),
    "taken along": (lambda y, v: torch.take_along_dim(y, _last(v)[..., :1], 1), (("gather", 0),)),
    "loss": (lambda y, v: F.cross_entropy(y.view(-1, E), LABELS.view(-1)), (("loss", 0),)),
    "loss in three dimensions": (lambda y, v: F.cross_entropy(y.transpose(1, 2), LABELS), (("loss", 0),)),
    "shifted loss": (lambda y, v: F.cross_entropy(y[:, :-1].reshape(-1, E), LABELS[:, 1:].reshape(-1)), (("loss", 0),)),
    "two of them": (lambda y, v: (y[:, 0], y[:, 1]), (("position", 0), ("position", 1))),
}


@pytest.mark.parametrize("name", READS)
def test_reads(name: str) -> None:
    tail, expected = READS[name]
    found = demand_on_attention(tail)
    assert found.leak is None
    assert sorted((r.kind, r.position) for r in found.reads) == sorted(expected)


def test_a_leak_beside_a_read() -> None:
    assert demand_on_attention(lambda y, v: (y[:, 0], y.mean(1))).leak is not None


def test_demands_add_up() -> None:
    x, valid = batch()
    node = analysed(attend, x, valid).node("attention_site")
    one, two, leak = (
        Demand(reads=frozenset({Read("position", node, 0)})),
        Demand(reads=frozenset({Read("position", node, 1)})),
        Demand(node, "why"),
    )
    assert (one | two).reads == one.reads | two.reads
    assert (one | leak) is leak
    assert (leak | one) is leak
    assert (one | NOTHING) is one
    assert not NOTHING
    assert one
    assert leak


@pytest.mark.parametrize("option", [{"partial": True}, {"exact": True}], ids=str)
def test_outputs_that_must_be_exact(option: dict[str, bool]) -> None:
    found = demand_on_attention(lambda y, v: y, **option)
    assert found.leak is not None
    assert found.leak.op == "output"


def test_residual_and_query_stay_tainted() -> None:
    """What goes in through the query, or around the attention, is needed with the result; what goes in as key is not."""
    x, valid = batch()

    def function(x: Tensor, valid: Tensor) -> Tensor:
        around, query, key = x * 2, x * 3, x * 4
        q, k = (t.view(B, S, H, -1).transpose(1, 2) for t in (query, key))
        y = F.scaled_dot_product_attention(q, k, k, attn_mask=valid[:, None, None])
        return (around + y.transpose(1, 2).reshape(x.shape)).mean(1)

    found = analysed(function, x, valid)
    around, query, key = (found.analysis.of(found.node("mul", i)) for i in range(3))
    assert around.leak is query.leak is not None
    assert key == NOTHING


def test_written_values_are_needed() -> None:
    x, valid = batch()

    def function(x: Tensor, valid: Tensor) -> Tensor:
        x.mul_(2)
        return attend(x * 1, valid)

    found = analysed(function, x, valid)
    assert found.analysis.of(found.node("mul_")).why == "its storage is written in place"


def test_other_masks_of_the_same_tokens() -> None:
    x, valid = batch()
    found = analysed(lambda x, v, w: attend(attend(x, v), w), x, valid, valid.clone())
    assert found.choice is not None
    assert len(found.choice.regions) == 2
    first = next(d for s, d in found.choice.domains.items() if s is found.node("attention_site", 0))
    assert "another mask" in found.choice.analyses[first].of(found.node("attention_site", 0)).why


def test_tokens_at_their_own_places() -> None:
    """Rows that were moved belong to other tokens, also where a moved slice was padded to the full length again."""
    x, valid = batch()

    def function(x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        y = attend(x, valid)
        shifted = F.pad(y[:, 1:], (0, 0, 0, 1))
        halves = torch.cat([F.glu(y, 1), F.glu(y, 1)], 1)
        return y * 2, shifted + y, y.flip(1) * 2, y + y[:, :1], halves + y, y[:, torch.arange(S)] * 2

    found = analysed(function, x, valid)
    assert [found.analysis.aligned[n] for n in found.outputs] == [True, False, False, False, False, False]


@pytest.mark.parametrize("shape", [(1, 6, 8), (6, 6, 8), (2, 4, 8), (8, 8, 8)], ids=str)
def test_sizes_that_coincide(shape: tuple[int, int, int]) -> None:
    x, valid = batch(*shape)
    over_features = analysed(lambda x, v: attend(x, v).sum(-1, keepdim=True) * 2, x, valid)
    assert over_features.analysis.of(over_features.node("attention_site")) == NOTHING
    over_positions = analysed(lambda x, v: attend(x, v).sum(1), x, valid)
    assert over_positions.analysis.of(over_positions.node("attention_site")).leak is over_positions.node("sum")
