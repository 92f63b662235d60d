"""What padded rows are known to hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from analysed import B, E, S, analysed, attend, batch
from torch import Tensor

KNOWN: dict[str, tuple[Callable[..., Any], Any]] = {
    "times mask": (lambda y, v: y * v[..., None], 0),
    "mask times": (lambda y, v: v[..., None].float() * y, 0),
    "times inverse of inverse": (lambda y, v: y * (~(~v))[..., None], 0),
    "times one minus": (lambda y, v: y * (1 - (~v).to(y.dtype))[..., None], 0),
    "filled": (lambda y, v: y.masked_fill(~v[..., None], -5.0), -5),
    "filled with minus infinity": (lambda y, v: y.masked_fill(~v[..., None], -math.inf), -math.inf),
    "where": (lambda y, v: torch.where(v[..., None], y, 2.0), 2),
    "where, swapped": (lambda y, v: torch.where(~v[..., None], 2.0, y), 2),
    "carried": (lambda y, v: (y * v[..., None] * 3 - 4).exp() * 2, 2 * math.exp(-4)),
    "divided": (lambda y, v: 1 / (y * v[..., None]), math.inf),
    "through views": (lambda y, v: (y * v[..., None] + 1).view(B, S, 2, -1).transpose(1, 2).unsqueeze(0), 1),
    "masked twice": (lambda y, v: (y * v[..., None] + 1) * v[..., None], 0),
    "two known": (lambda y, v: (y * v[..., None] + 1) - y.masked_fill(~v[..., None], 4.0), -3),
    "compared": (lambda y, v: (y * v[..., None]) == 0, True),
    "and": (lambda y, v: (y > 0) & v[..., None], False),
    "not": (lambda y, v: ~((y > 0) & v[..., None]), True),
    "dropout of zero": (lambda y, v: F.dropout(y * v[..., None], 0.5, True), 0),
    "clamped": (lambda y, v: y.masked_fill(~v[..., None], -1e9).clamp(min=-3), -3),
    "the mask": (lambda y, v: v * 1, 0),
    "its inverse": (lambda y, v: (~v) * 1, 1),
    "softmax over positions": (lambda y, v: y.sum(-1).masked_fill(~v, -math.inf).softmax(1), 0),
    "softmax of low scores": (lambda y, v: y.sum(-1).masked_fill(~v, -1e9).softmax(1), 0),
    "zeros like it": (lambda y, v: torch.zeros_like(y) + 1, 1),
    "counted down": (lambda y, v: v.long() - 1, -1),
}


def known(tail: Callable[..., Any], mode: str = "model", **options: Any) -> tuple[Any, Any]:
    x, valid = batch()
    found = analysed(lambda x, v: (attend(x, v), tail(attend(x, v), v)), x, valid, mode=mode, **options)  # type: ignore[arg-type]
    return found.region.pad_values.value(found.outputs[1]), found


@pytest.mark.parametrize("name", KNOWN)
def test_known(name: str) -> None:
    tail, expected = KNOWN[name]
    value, _ = known(tail)
    assert value == pytest.approx(expected)


UNKNOWN: dict[str, Callable[..., Any]] = {
    "nothing": lambda y, v: y * 2,
    "the opposite": lambda y, v: y * (~v)[..., None],
    "filled where valid": lambda y, v: y.masked_fill(v[..., None], 0.0),
    "added": lambda y, v: y + v[..., None],
    "half": lambda y, v: y * (v.float() * 0.5 + 0.5)[..., None],
    "another mask": lambda y, v: y * v.roll(1, 1)[..., None],
    "a longer mask": lambda y, v: y * (v | (torch.arange(S) == 4))[..., None],
    "one of two": lambda y, v: torch.where(v[..., None], y, y.mean(-1, keepdim=True)),
    "random": lambda y, v: torch.rand_like(y * v[..., None]),
    "dropout of one": lambda y, v: F.dropout(y * v[..., None] + 1, 0.5, True),
    "over positions": lambda y, v: (y * v[..., None] + 1).cumsum(1),
    "moved": lambda y, v: (y * v[..., None]).roll(1, 1),
    "softmax of mild scores": lambda y, v: y.sum(-1).masked_fill(~v, -5.0).softmax(1),
    "softmax over the batch": lambda y, v: y.sum(-1).masked_fill(~v, -math.inf).softmax(0),
    "softmax under two masks": lambda y, v: y.sum(-1).masked_fill(~v | (y[..., 0] > 0), -1e9).softmax(1),
    "softmax of scores that are masked twice": lambda y, v: (
        y.sum(-1).masked_fill(y[..., 0] > 0, -1e9).masked_fill(~v, -1e9).softmax(1)
    ),
    "any of the row": lambda y, v: y * v.any(1)[:, None, None],
    "parameter put in": lambda y, v: torch.where(v[..., None], y, torch.arange(E) * 1.0),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name: str) -> None:
    value, _ = known(UNKNOWN[name])
    assert value is None


def test_a_softmax_presumes_a_position() -> None:
    """Finite low scores weigh nothing only beside others: a fact for the plan, so nothing in the form without one."""
    low = KNOWN["softmax of low scores"][0]
    _, found = known(low)
    assert len(found.region.pad_values.nonempty) == 1
    assert len(found.region.pad_values.assumptions) == 1
    assert known(low, mode="attention")[0] is None
    lowest = lambda y, v: y.sum(-1).masked_fill(~v, torch.finfo(y.dtype).min).softmax(1)  # noqa: E731
    assert not known(lowest)[1].region.pad_values.assumptions
    infinite = KNOWN["softmax over positions"][0]
    assert not known(infinite)[1].region.pad_values.nonempty


@pytest.mark.parametrize(
    ("dtype", "value", "expected"), [(torch.float16, -1e30, -math.inf), (torch.bfloat16, -1e30, -1e30), (torch.int8, -3, -3)]
)
def test_the_real_dtype(dtype: torch.dtype, value: float, expected: float) -> None:
    def tail(y: Tensor, v: Tensor) -> Tensor:
        full = torch.where(v[..., None], y, value)
        return full.to(dtype)

    assert known(tail)[0] == pytest.approx(expected, rel=1e-2)


def test_scalars_do_not_promote_rows() -> None:
    """A half row plus a float32 number without dimensions is half: 60000 + 60000 is infinite there."""

    def tail(y: Tensor, v: Tensor) -> Tensor:
        rows = y.half().masked_fill(~v[..., None], 60000.0)
        return rows + torch.full((), 60000.0)

    assert known(tail)[0] == math.inf


def test_a_written_value_is_not_known() -> None:
    x, valid = batch()

    def function(x: Tensor, valid: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        out.copy_(x * valid[..., None])
        kept = out * 1
        out.add_(1)
        return attend(x, valid), kept

    found = analysed(function, x, valid, torch.zeros_like(x))
    assert found.region.pad_values.value(found.inputs[2]) is None
    assert found.region.pad_values.value(found.outputs[1]) is None


def test_a_learned_mask_is_not_known() -> None:
    """A constant in the place of a value that has a gradient would cut it off."""
    x, valid = batch()
    gate = valid.float().requires_grad_()
    found = analysed(lambda x, v, g: (attend(x, v), x * g[..., None]), x, valid, gate)
    assert found.region.pad_values.value(found.outputs[1]) is None
