"""Rules 4, 7, 8 and 9 of the contract: what attention lets through, what masks are, where windows lie, queries without keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from soundness.harness import (
    BATCH,
    FORMS,
    LENGTH,
    MASKS,
    WIDTH,
    assert_leaks,
    assert_left_alone,
    assert_packed,
    both_ways,
    causal,
    check,
    hidden,
    keys,
    mask_of,
)

RIGHT = mask_of("right")
LOWEST = torch.finfo(torch.float64).min


def decomposed(m: Any, x: Tensor, add: Tensor) -> Tensor:
    """Attention by hand: scores plus ``add``, softmax, values."""
    query, key, value = m.a.qkv(x).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + add).softmax(-1)
    return x + m.a.out((weights @ value).transpose(1, 2).reshape(x.shape))


# --- rule 4: taint goes through keys and values only, and only where the mask hides it ---------------------------------


@both_ways
def test_rule_04_a_leak_makes_every_attention_exact(form: str, train: bool) -> None:
    """Were only the last layer exact, it would be given queries and a residual that are not."""

    def body(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        return m.b(m.a(x, keys(valid)), keys(valid)).mean(1)

    result = check(body, (hidden(), RIGHT), None, packing=form, train=train)
    assert result.forms == ["exact", "exact"]
    assert_leaks(result, "mean")


@both_ways
@pytest.mark.parametrize("mask", ["right", "left", "holes", "empty row"])
def test_rule_04_two_masks_of_the_same_tokens(mask: str, form: str, train: bool) -> None:
    """A row padded under one mask and valid under the other is observable."""

    def body(m: Any, x: Tensor, one: Tensor, two: Tensor) -> Tensor:
        return m.b(m.a(x, keys(one)), keys(two))

    one = mask_of(mask)
    two = one & (torch.arange(LENGTH) != 1) | (torch.arange(LENGTH) == 7)
    result = check(body, (hidden(), one, two), None, packing=form, train=train)
    assert result.forms == ["exact", "exact"]


@both_ways
def test_rule_04_a_weaker_second_mask(form: str, train: bool) -> None:
    def body(m: Any, x: Tensor, one: Tensor, two: Tensor) -> Tensor:
        return (m.b(m.a(x, keys(one & two)), keys(two)) * two[..., None]).sum(1)

    result = check(body, (hidden(), RIGHT, mask_of("holes")), None, packing=form, train=train)
    assert "packed" in result.forms or "zero rows" in result.forms


def cross(m: Any, x: Tensor, memory: Tensor, valid: Tensor) -> Tensor:
    return m.linear(m.a(x, keys(valid), memory=memory))


@both_ways
@pytest.mark.parametrize("length", [LENGTH, 5], ids=["same length", "other length"])
def test_rule_04_cross_attention(length: int, form: str, train: bool) -> None:
    """Queries whose own tokens no mask hides are all valid; the keys run packed."""

    def body(m: Any, x: Tensor, memory: Tensor, valid: Tensor) -> Tensor:
        return cross(m, x, m.norm(m.linear(memory)), valid)

    memory, valid = hidden(length=length), mask_of("holes", length=length)
    result = check(body, (hidden(), memory, valid), None, packing=form, train=train)
    assert result.forms == ["exact"]
    assert result.packed == (form == "model")


@both_ways
@pytest.mark.parametrize("batch", [1, BATCH])
def test_rule_04_shared_positions(batch: int, form: str, train: bool) -> None:
    """Source and target that are given the same positions do not have the same padding."""

    def body(m: Any, x: Tensor, memory: Tensor, valid: Tensor) -> Tensor:
        return cross(m, x + m.position, memory + m.position, valid)

    given = (hidden(batch), hidden(batch), mask_of("holes", batch))
    result = check(body, given, None, packing=form, train=train)
    assert result.forms == ["exact"]


@both_ways
def test_rule_04_encoder_and_decoder(form: str, train: bool) -> None:
    """Both sides packed, each by its own mask, though they share a table of positions."""

    def body(m: Any, x: Tensor, memory: Tensor, own: Tensor, valid: Tensor) -> Tensor:
        memory = m.b(memory + m.position, keys(valid))
        x = m.a(x + m.position, causal(own))
        return m.linear(m.a(x, keys(valid), memory=m.norm(memory)))

    own, valid = mask_of("left"), mask_of("right")
    result = check(body, (hidden(), hidden(), own, valid), own, packing=form, train=train)
    assert_packed(result, form)
    assert len(result.report.regions) == 2


@both_ways
def test_rule_04_hidden_queries(form: str, train: bool) -> None:
    """``valid[:, :, None] & valid[:, None, :]`` hides padded queries too: free where they are not run, else left alone."""

    def body(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        return m.a(x, valid[:, None, :, None] & keys(valid))

    assert_packed(check(body, (hidden(), RIGHT), RIGHT, packing=form, train=train), form)
    leaky = check(lambda m, x, v: body(m, x, v).mean(1), (hidden(), RIGHT), None, packing=form, train=train)
    assert_left_alone(leaky, "hides queries")
    other = check(
        lambda m, x, q, k: m.a(x, q[:, None, :, None] & keys(k)),
        (hidden(), mask_of("holes"), RIGHT),
        None,
        packing=form,
        train=train,
    )
    assert_left_alone(other, "hides queries")


# --- rule 7: the predicate itself, in the real dtype -----------------------------------------------------------------


@both_ways
def test_rule_07_segments(form: str, train: bool) -> None:
    """``segments == 1`` is not whether a segment number is true."""
    segments = torch.randint(0, 3, (BATCH, LENGTH))
    segments[:, 0] = 1
    result = check(lambda m, x, s: m.a(x, keys(s == 1)), (hidden(), segments), segments == 1, packing=form, train=train)
    assert_packed(result, form)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_rule_07_an_integer_mask_in_arithmetic(train: bool) -> None:
    """``(1 - mask) * -10000`` hides nothing where the mask is 2: the plan looks, and the padded graph runs."""

    def body(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.a(x, (1.0 - keys(mask).to(x.dtype)) * -10000.0)

    twos = RIGHT.long() + (torch.arange(LENGTH) > 3).long() * RIGHT.long()
    result = check(body, (hidden(), RIGHT.long()), RIGHT, train=train, batches=[(hidden(), twos)])
    assert (result.packed, result.padded) == (1, 1)
    assert "is 0 or 1" in result.reasons
    assert_left_alone(check(body, (hidden(), twos), RIGHT, packing="attention", train=train), "is 0 or 1")


@both_ways
def test_rule_07_a_mask_that_requires_grad(form: str, train: bool) -> None:
    soft = (torch.rand(BATCH, LENGTH) > 0.4).double().requires_grad_()
    result = check(lambda m, x, s: m.a(x, keys(1 - s) * -2e4), (hidden(), soft), None, packing=form, train=train)
    assert_left_alone(result, "learned")
    result = check(lambda m, x, s: m.a(x, keys(1 - s.detach()) * -2e4), (hidden(), soft), None, packing=form, train=train)
    assert_left_alone(result, "learned")


@both_ways
def test_rule_07_a_soft_mask(form: str, train: bool) -> None:
    """Values between 0 and 1 make a bias, not a mask."""
    soft = torch.rand(BATCH, LENGTH)
    result = check(lambda m, x, s: m.a(x, keys(1 - s) * -3.0), (hidden(), soft), None, packing=form, train=train)
    assert not result.forms


@both_ways
def test_rule_07_the_real_dtype(form: str, train: bool) -> None:
    """The lowest float32 in bfloat16, and twice it, are minus infinity."""
    lowest = torch.finfo(torch.float32).min

    def body(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        mask = torch.where(keys(valid), 0.0, lowest)
        return m.a(x, (mask + mask).to(torch.bfloat16).to(x.dtype))

    result = check(body, (hidden(), RIGHT), RIGHT, packing=form, train=train)
    assert_packed(result, form)


@both_ways
def test_rule_07_polarity(form: str, train: bool) -> None:
    result = check(lambda m, x, pad: m.a(x, keys(~pad)), (hidden(), ~RIGHT), RIGHT, packing=form, train=train)
    assert_packed(result, form)
    result = check(lambda m, x, v: m.a(x, keys(~v)), (hidden(), ~mask_of("holes")), mask_of("holes"), packing=form, train=train)
    assert_packed(result, form)


# --- rule 8: rank is not position ------------------------------------------------------------------------------------


def window(valid: Tensor, left: int, right: int) -> Tensor:
    """Key padding and ``q - left <= k <= q + right``; -1 for unbounded."""
    q, k = torch.arange(valid.shape[1])[:, None], torch.arange(valid.shape[1])[None]
    visible = keys(valid)
    if left != -1:
        visible = visible & (k >= q - left)
    return visible & (k <= q + right) if right != -1 else visible


WINDOWS = {"causal": (-1, 0), "sliding": (2, 1), "sliding causal": (3, 0), "left only": (2, -1), "itself": (0, 0)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", WINDOWS)
def test_rule_08_windows_in_a_region(name: str, mask: str) -> None:
    """Causality goes by rank whatever the mask; a window does only where valid positions are contiguous, which the plan checks."""
    left, right = WINDOWS[name]

    def body(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        return m.linear(m.a(x, window(valid, left, right)))

    valid = mask_of(mask)
    result = check(body, (hidden(), valid), valid)
    by_rank = name == "causal" or mask not in ("holes", "all", "none")
    assert result.packed == (by_rank and mask not in ("all", "none"))
    assert ("contiguous" in result.reasons) == (name != "causal")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", WINDOWS)
def test_rule_08_windows_without_a_plan(name: str, mask: str) -> None:
    """The attention-only form goes by position: zero rows, and the exact form (where nothing aligns at the bottom right)."""
    left, right = WINDOWS[name]
    valid = mask_of(mask)

    def body(m: Any, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x, window(valid, left, right))
        return m.b(y, window(valid, left, right)), y.mean(1)

    result = check(body, (hidden(), valid), (valid, None), packing="attention")
    assert result.forms == ["exact", "zero rows"]


@both_ways
@pytest.mark.parametrize("mask", ["right", "left", "holes"])
def test_rule_08_exact_causal(mask: str, form: str, train: bool) -> None:
    result = check(lambda m, x, v: m.a(x, causal(v)).sum(1), (hidden(), mask_of(mask)), None, packing=form, train=train)
    assert_leaks(result, "sum")


@both_ways
def test_rule_08_added_masks(form: str, train: bool) -> None:
    """Two additive masks, of which each is the lowest number and the sum minus infinity."""

    def body(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        later = torch.zeros(LENGTH, LENGTH, dtype=x.dtype).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), LOWEST)
        padding = torch.zeros(valid.shape, dtype=x.dtype).masked_fill(~valid, LOWEST)
        return decomposed(m, x, later + padding[:, None, None])

    result = check(body, (hidden(), mask_of("left")), mask_of("left"), packing=form, train=train)
    assert_packed(result, form)


# --- rule 9: queries that see no key ---------------------------------------------------------------------------------

EMPTY = {
    "boolean": lambda m, x, visible: m.a(x, visible),
    "minus infinity": lambda m, x, visible: m.a(x, torch.zeros(visible.shape, dtype=x.dtype).masked_fill(~visible, -math.inf)),
    "lowest": lambda m, x, visible: m.a(x, torch.zeros(visible.shape, dtype=x.dtype).masked_fill(~visible, LOWEST)),
    "-10000": lambda m, x, visible: m.a(x, (1.0 - visible.to(x.dtype)) * -10000.0),
    "by hand, minus infinity": lambda m, x, visible: decomposed(
        m, x, torch.zeros(visible.shape, dtype=x.dtype).masked_fill(~visible, -math.inf)
    ),
    "by hand, lowest": lambda m, x, visible: decomposed(
        m, x, torch.zeros(visible.shape, dtype=x.dtype).masked_fill(~visible, LOWEST)
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["empty row", "none", "left"])
@pytest.mark.parametrize("shape", ["padding", "causal"])
@pytest.mark.parametrize("name", EMPTY)
def test_rule_09_observable(name: str, shape: str, mask: str, form: str) -> None:
    """Every row is summed, those of queries without keys too: zero, NaN, the mean, or unmasked attention, as eager has it."""

    def body(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        return EMPTY[name](m, x, causal(valid) if shape == "causal" else keys(valid)).sum(1)

    result = check(body, (hidden(), mask_of(mask)), None, packing=form)
    assert set(result.forms) <= {"exact"}


@both_ways
@pytest.mark.parametrize("name", EMPTY)
def test_rule_09_unobservable(name: str, form: str, train: bool) -> None:
    """Where only valid rows can be seen, it does not matter what the others would be."""

    def body(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        y = m.linear(EMPTY[name](m, x, causal(valid)))
        return (y * valid[..., None]).sum(1)

    result = check(body, (hidden(), mask_of("left")), None, packing=form, train=train)
    assert_packed(result, form)


@pytest.mark.parametrize("form", FORMS)
def test_rule_09_cross_attention_to_nothing(form: str) -> None:
    """Queries of another stream can be valid and see no key at all."""

    def body(m: Any, x: Tensor, memory: Tensor, valid: Tensor, own: Tensor) -> Tensor:
        x = m.b(x, keys(own))
        mask = torch.zeros(BATCH, 1, 1, LENGTH, dtype=x.dtype).masked_fill(~keys(valid), LOWEST)
        return m.linear(m.a(x, mask, memory=memory))

    own = mask_of("right")
    given = (hidden(), hidden(), mask_of("empty row"), own)
    result = check(body, given, own, packing=form, batches=[(hidden(), hidden(), mask_of("left"), own)])
    if form == "model":
        assert (result.packed, result.padded) == (1, 1)
        assert "every sequence has a valid position" in result.reasons


@pytest.mark.parametrize("form", FORMS)
def test_rule_09_a_head_of_one(form: str) -> None:
    """A query that sees nothing, beside a loss that needs its row to be finite."""

    def body(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        y = m.a(x, keys(valid))
        return (F.normalize(y, dim=-1) * valid[..., None]).sum((0, 1)).reshape(WIDTH)

    assert_packed(check(body, (hidden(), mask_of("empty row")), None, packing=form), form)


@both_ways
def test_a_mask_that_no_input_decides(form: str, train: bool) -> None:
    """The same positions are padding in each batch."""

    def body(m: Any, x: Tensor) -> Tensor:
        mask = torch.arange(LENGTH) < LENGTH // 2
        return m.linear(m.a(x, mask[None, None, None, :]))

    valid = (torch.arange(LENGTH) < LENGTH // 2).expand(BATCH, -1)
    assert_packed(check(body, (hidden(),), valid, packing=form, train=train), form)
