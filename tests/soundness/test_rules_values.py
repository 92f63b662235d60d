"""Rules 1, 5, 11 and 13 of the contract: what padded rows hold, who reads them, and that dead rows do no harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundness.harness import (
    BATCH,
    FORMS,
    LENGTH,
    MASKS,
    WIDTH,
    Program,
    SelfAttention,
    assert_leaks,
    assert_packed,
    both_ways,
    check,
    hidden,
    keys,
    mask_of,
    poisoned,
)

RIGHT = mask_of("right")


def after_attention(tail: Any) -> Any:
    """``tail(layers, y, valid)`` behind one masked attention."""
    return lambda m, x, valid: tail(m, m.linear(m.a(x, keys(valid))), valid)


# --- rule 1: absorbing is not zero -----------------------------------------------------------------------------------


ABSORBED = {
    "attention pooling": lambda m, y, v: (m.score(y).squeeze(-1).masked_fill(~v, -torch.inf).softmax(1)[..., None] * y).sum(1),
    "masked max": lambda m, y, v: (y - 5).masked_fill(~v[..., None], -1e9).amax(1),
    "masked mean": lambda m, y, v: (y * v[..., None]).sum(1) / v.sum(1, keepdim=True).clamp(min=1),
    "mean with eager's denominator": lambda m, y, v: (y * v[..., None]).mean((1, 2)),
    "a constant that is carried": lambda m, y, v: (y * v[..., None] - 3).mean(1),
    "a constant through functions": lambda m, y, v: ((y * v[..., None]).exp() * 2 + 1).sum(1),
    "a fill through softmax": lambda m, y, v: m.score(y).squeeze(-1).masked_fill(~v, -1e4).softmax(1),
    "where": lambda m, y, v: torch.where(v[..., None], y, 2.0).prod(1),
    "float mask": lambda m, y, v: (y * v.to(y.dtype)[..., None]).sum((0, 1)),
    "mask of another spelling": lambda m, y, v: (y * (v.long() != 0)[..., None]).sum(1),
    "weights in a matrix product": lambda m, y, v: torch.bmm(v.to(y.dtype)[:, None], y).flatten(),
    "weights that were learned": lambda m, y, v: (m.score(y).squeeze(-1).masked_fill(~v, -torch.inf).softmax(1)[:, None] @ y)[:, 0],
    "weights in einsum": lambda m, y, v: torch.einsum("bse,bs->be", y, v.to(y.dtype)),
    "inverted twice": lambda m, y, v: y.masked_fill(~v[..., None], 0).sum(1),
    "one minus": lambda m, y, v: (y * (1 - (~v).to(y.dtype))[..., None]).sum(1),
    "index put": lambda m, y, v: _set(y, v).amax(1),
    "scores masked before the head": lambda m, y, v: m.head((y * v[..., None]).sum(1)).log_softmax(-1),
    "masked twice": lambda m, y, v: ((y * v[..., None] + 1) * v[..., None]).sum(1),
    "a fill over features": lambda m, y, v: y.masked_fill(~v[..., None], -9.0).softmax(-1).amax(1),
    "clamped fill": lambda m, y, v: y.masked_fill(~v[..., None], -1e9).clamp(min=-2).mean(1),
}


def _set(y: Tensor, valid: Tensor) -> Tensor:
    y = y * 1
    y[~valid] = -7
    return y


@both_ways
@pytest.mark.parametrize("name", ABSORBED)
def test_rule_01_known_rows(name: str, form: str, train: bool) -> None:
    mask = "left" if name == "a fill through softmax" else "right"
    result = check(after_attention(ABSORBED[name]), (hidden(), mask_of(mask)), None, packing=form, train=train)
    assert_packed(result, form)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("score", [-1e30, -1e9, -1e4])
def test_rule_01_scores_far_below(score: float, train: bool) -> None:
    """A finite score hides a position unless there is no other: in an empty row all weigh the same, which the plan looks for."""

    def tail(m: Any, y: Tensor, v: Tensor) -> Tensor:
        return (m.score(y).squeeze(-1).masked_fill(~v, score).softmax(1)[..., None] * y).sum(1)

    result = check(after_attention(tail), (hidden(), RIGHT), None, train=train, batches=[(hidden(), mask_of("empty row"))])
    assert_packed(result, "model")
    assert result.padded == 1
    assert "every sequence has a valid position" in result.reasons
    assert ("far above it" in result.reasons) == (score > -1e30)
    assert_leaks(check(after_attention(tail), (hidden(), RIGHT), None, packing="attention", train=train), "sum")


NOT_ABSORBED = {
    "the opposite polarity": ("sum", lambda m, y, v: (y * (~v)[..., None]).sum(1)),
    "filled where valid": ("sum", lambda m, y, v: y.masked_fill(v[..., None], 0).sum(1)),
    "an unknown value put in": ("sum", lambda m, y, v: torch.where(v[..., None], y, y.mean(-1, keepdim=True)).sum(1)),
    "weights of other rows": ("matmul", lambda m, y, v: v.to(y.dtype) @ y),
    "weights that are not summed over": ("sum", lambda m, y, v: torch.einsum("bse,bt->be", y, v.to(y.dtype))),
    "no mask": ("mean", lambda m, y, v: y.mean(1)),
    "added instead of multiplied": ("amax", lambda m, y, v: (y + v[..., None]).amax(1)),
    "another mask": ("sum", lambda m, y, v: (y * (v.roll(1, 1))[..., None]).sum(1)),
    "half of the mask": ("sum", lambda m, y, v: (y * (v.to(y.dtype) * 0.5 + 0.5)[..., None]).sum(1)),
    "a mask of fewer rows": ("sum", lambda m, y, v: (y * (v & (torch.arange(LENGTH) != 2) | ~v)[..., None]).sum(1)),
}


@both_ways
@pytest.mark.parametrize("name", NOT_ABSORBED)
def test_rule_01_leaks(name: str, form: str, train: bool) -> None:
    operation, tail = NOT_ABSORBED[name]
    result = check(after_attention(tail), (hidden(), RIGHT), None, packing=form, train=train)
    assert_leaks(result, operation)


@both_ways
@pytest.mark.parametrize("mask", MASKS)
def test_rule_01_data(mask: str, form: str, train: bool) -> None:
    """Means, maxima and softmax pooling over whatever padding there may be."""

    def heads(m: Any, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return tuple(ABSORBED[name](m, y, v) for name in ("masked mean", "masked max", "a constant that is carried", "where"))

    result = check(after_attention(heads), (hidden(), mask_of(mask)), None, packing=form, train=train)
    assert_packed(result, form, 0 if mask in ("all", "none") else 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rule_01_constants_in_their_dtype(dtype: torch.dtype) -> None:
    """The lowest float32 is minus infinity in half precision, and stays that on the way to a clamp."""
    lowest = torch.finfo(torch.float32).min

    def tail(m: Any, y: Tensor, v: Tensor) -> Tensor:
        low = torch.where(v[..., None], y.float(), lowest).to(y.dtype) * 0.5
        return low.clamp(min=-4).sum(1)

    result = check(after_attention(tail), (hidden(), RIGHT), None, dtype=dtype)
    assert_packed(result, "model")


# --- rule 5: taint starts at every packed node -----------------------------------------------------------------------


@both_ways
def test_rule_05_read_before_the_attention(form: str, train: bool) -> None:
    """The mean of the embeddings needs padded rows of what the packed part packs."""

    def body(m: Any, ids: Tensor, valid: Tensor) -> Tensor:
        x = m.embed(ids)
        return (m.a(x, keys(valid)) * valid[..., None]).sum(1) + x.relu().mean(1)

    result = check(body, (torch.randint(0, 50, (BATCH, LENGTH)), RIGHT), None, packing=form, train=train)
    assert_packed(result, form)


@both_ways
def test_rule_05_read_between_the_attentions(form: str, train: bool) -> None:
    def body(m: Any, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x, keys(valid))
        return m.b(m.norm(y), keys(valid)), y.amax(1)

    result = check(body, (hidden(), RIGHT), (RIGHT, None), packing=form, train=train)
    assert result.forms == ["exact", "packed" if form == "model" else "zero rows"]


# --- rule 11: dead rows are harmless ---------------------------------------------------------------------------------

SINGULAR = {
    "unit length": lambda m, y, v: (y / y.norm(dim=-1, keepdim=True) * v[..., None]).sum(1),
    "by a sum of squares": lambda m, y, v: (y / y.pow(2).sum(-1, keepdim=True).sqrt()).masked_fill(~v[..., None], 0).sum(1),
    "entropy": lambda m, y, v: (-(m.head(y).softmax(-1).log() * m.head(y).softmax(-1)).sum(-1) * v).sum(1),
    "logarithm": lambda m, y, v: (y.abs().amax(-1).log2() * v).sum(1),
    "through an operation without a packed twin": lambda m, y, v: (_unit(torch.fft.fft(y, dim=-1).real) * v[..., None]).sum(1),
    "square root": lambda m, y, v: (y.abs().sqrt() * v[..., None]).sum(1),
}


def _unit(y: Tensor) -> Tensor:
    return y / y.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["right", "holes", "one token", "empty row"])
@pytest.mark.parametrize("name", SINGULAR)
def test_rule_11_singular_at_zero(name: str, mask: str, form: str) -> None:
    result = check(after_attention(SINGULAR[name]), (hidden(), mask_of(mask)), None, packing=form)
    assert all(g is None or g.isfinite().all() for g in result.ours.gradients.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mask", ["right", "left", "holes", "empty row", "one token"])
def test_rule_11_poisoned_padding(mask: str, train: bool) -> None:
    """Padding that is no number reaches neither valid rows nor gradients."""
    valid, x = mask_of(mask), hidden()

    def body(m: Any, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        y = m.b(m.norm(m.a(m.linear(x) + m.position, keys(valid))), keys(valid))
        return y, (y * valid[..., None]).sum(1)

    result = check(body, (poisoned(x, valid), valid), (valid, None), train=train, clean=(x, valid))
    assert_packed(result, "model")


def test_rule_11_poisoned_keys() -> None:
    """In the attention-only form padded keys and values may hold anything, and its rows come out as zeros."""
    valid, x = RIGHT, hidden()

    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = SelfAttention()

        def forward(self, x: Tensor, memory: Tensor, valid: Tensor) -> Tensor:
            return self.a(x, keys(valid), memory)

    model, memory = Keys(), hidden(grad=False)
    for form in ("model", "attention"):
        given = (x, poisoned(memory, valid), valid)
        # Weights of keys would get NaN from NaN keys in eager too (0 * NaN), so only the results are compared.
        result = check(model, given, None, packing=form, train=False, clean=(x, memory, valid))
        assert result.forms == ["exact"]


# --- rule 13: what is not known leaks --------------------------------------------------------------------------------

UNKNOWN = {
    "conv": lambda m, y, v: m.conv(y.transpose(1, 2)).transpose(1, 2),
    "cumsum": lambda m, y, v: y.cumsum(1),
    "flip": lambda m, y, v: y.flip(1),
    "roll": lambda m, y, v: y.roll(1, 1),
    "sort": lambda m, y, v: y.sort(1)[0],
    "topk": lambda m, y, v: y.topk(3, 1)[0],
    "sorted folded": lambda m, y, v: y.reshape(-1, WIDTH).sort(0)[0],
    "batch norm": lambda m, y, v: F.batch_norm(y.transpose(1, 2), None, None, training=True).transpose(1, 2),
    "instance norm": lambda m, y, v: F.instance_norm(y.transpose(1, 2)).transpose(1, 2),
    "group norm": lambda m, y, v: F.group_norm(y.transpose(1, 2), 2).transpose(1, 2),
    "norm over positions too": lambda m, y, v: F.layer_norm(y, (LENGTH, WIDTH)),
    "amax of all": lambda m, y, v: y / y.abs().amax(),
    "quantised by the largest": lambda m, y, v: (y / y.detach().abs().max() * 127).round() * y.detach().abs().max() / 127 + y,
    "batch mean": lambda m, y, v: y - y.mean(0, keepdim=True),
    "unmasked attention": lambda m, y, v: m.b(y, None),
    "scores": lambda m, y, v: y @ y.transpose(1, 2),
    "logsumexp": lambda m, y, v: y.logsumexp(1),
    "pooling": lambda m, y, v: F.avg_pool1d(y.transpose(1, 2), 2).transpose(1, 2),
    "interpolation": lambda m, y, v: F.interpolate(y.transpose(1, 2), scale_factor=2).transpose(1, 2),
    "unfold": lambda m, y, v: y.unfold(1, 3, 1),
    "view across positions": lambda m, y, v: m.linear(y.reshape(BATCH, LENGTH // 2, 2, WIDTH).mean(2)),
    "mixed into features": lambda m, y, v: y.reshape(BATCH, LENGTH // 2, 2 * WIDTH).softmax(-1),
    "recurrence": lambda m, y, v: torch.stack([y[:, : i + 1].sum(1) for i in range(LENGTH)], 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", UNKNOWN)
def test_rule_13_leaks(name: str, form: str) -> None:
    valid = mask_of("holes")
    result = check(after_attention(UNKNOWN[name]), (hidden(), valid), valid if name == "unmasked attention" else None, packing=form)
    assert set(result.forms) == {"exact"}, result.report.table()


def test_rule_13_autograd_function() -> None:
    """A function with a backward of its own is opaque."""

    class Mean(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x - x.mean(1, keepdim=True)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    result = check(after_attention(lambda m, y, v: Mean.apply(y)), (hidden(), RIGHT), None)
    assert set(result.forms) == {"exact"}


def test_rule_13_frequencies_of_indices() -> None:
    """The gradient of an embedding that is scaled by frequency counts padding too."""

    class Frequencies(Program):
        def __init__(self) -> None:
            super().__init__(lambda m, ids, valid: m.a(m.scaled(ids), keys(valid)))
            self.scaled = nn.Embedding(6, WIDTH, scale_grad_by_freq=True)

    result = check(Frequencies(), (torch.randint(0, 6, (BATCH, LENGTH)), RIGHT), RIGHT)
    assert_packed(result, "model")
