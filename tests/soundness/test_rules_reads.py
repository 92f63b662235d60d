"""Rules 2, 3 and 12 of the contract: losses in the graph, reads of single positions, outputs that lie along the positions."""

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
    WIDTH,
    Program,
    assert_leaks,
    assert_packed,
    both_ways,
    causal,
    check,
    hidden,
    keys,
    mask_of,
)

RIGHT = mask_of("right")
CLASSES = 7


def labels_for(valid: Tensor, ignore: int = -100) -> Tensor:
    return torch.randint(0, CLASSES, (BATCH, LENGTH)).masked_fill(~valid, ignore)


def logits_of(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    return m.head(m.a(x, causal(valid)))


# --- rule 2: losses in the graph -------------------------------------------------------------------------------------

LOSSES = {
    "mean": lambda y, t: F.cross_entropy(y.view(-1, CLASSES), t.view(-1)),
    "sum": lambda y, t: F.cross_entropy(y.view(-1, CLASSES), t.view(-1), reduction="sum"),
    "smoothed": lambda y, t: F.cross_entropy(y.view(-1, CLASSES), t.view(-1), label_smoothing=0.2),
    "weighted": lambda y, t: F.cross_entropy(
        y.view(-1, CLASSES), t.view(-1), weight=torch.linspace(0.5, 2, CLASSES, dtype=y.dtype)
    ),
    "smoothed and weighted": lambda y, t: F.cross_entropy(
        y.view(-1, CLASSES), t.view(-1), weight=torch.linspace(0.5, 2, CLASSES, dtype=y.dtype), label_smoothing=0.1
    ),
    "three dimensions": lambda y, t: F.cross_entropy(y.transpose(1, 2), t),
    "permuted": lambda y, t: F.cross_entropy(y.permute(0, 2, 1), t, reduction="sum"),
    "in float32": lambda y, t: F.cross_entropy(y.float().view(-1, CLASSES), t.view(-1)).double(),
}


@both_ways
@pytest.mark.parametrize("name", LOSSES)
def test_rule_02_ignored_padding(name: str, form: str, train: bool) -> None:
    """Labels of padding are ignored, so no padded row is needed. A batch where they are not runs padded."""

    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        return LOSSES[name](logits_of(m, x, valid), labels)

    other = torch.randint(0, CLASSES, (BATCH, LENGTH))
    tolerance = 1e-5 if name == "in float32" else None
    result = check(
        body,
        (hidden(), RIGHT, labels_for(RIGHT)),
        None,
        packing=form,
        train=train,
        batches=[(hidden(), RIGHT, other)],
        tolerance=tolerance,
    )
    if form == "model":
        assert (result.packed, result.padded, set(result.forms)) == (1, 1, {"packed"})
        assert "labels" in result.reasons
    else:
        assert_leaks(result, "may be read")


def test_rule_02_other_ignore_index() -> None:
    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(m, x, valid).view(-1, CLASSES), labels.view(-1), ignore_index=0)

    given = [(hidden(), RIGHT, labels_for(RIGHT, ignore)) for ignore in (0, 3)]
    result = check(body, given[0], None, batches=given[1:])
    assert (result.packed, result.padded) == (1, 1)


def test_rule_02_all_ignored() -> None:
    """The mean over no label is no number, in eager as here; a sum over none is zero."""
    labels = torch.full((BATCH, LENGTH), -100)
    for name in ("mean", "sum"):
        body = lambda m, x, v, t, name=name: LOSSES[name](logits_of(m, x, v), t)  # noqa: E731
        result = check(body, (hidden(), RIGHT, labels), None)
        assert_packed(result, "model")
        assert result.ours is not None and bool(result.ours.outputs[0].isnan()) == (name == "mean")


@both_ways
def test_rule_02_probabilities(form: str, train: bool) -> None:
    """Labels that are probabilities have none to ignore."""

    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(m, x, valid).view(-1, CLASSES), labels.view(-1, CLASSES).softmax(-1))

    result = check(body, (hidden(), RIGHT, torch.randn(BATCH, LENGTH, CLASSES)), None, packing=form, train=train)
    assert_leaks(result, "cross_entropy")


@both_ways
def test_rule_02_known_logits_count(form: str, train: bool) -> None:
    """Logits that are masked to zero still have a loss, if their labels are not ignored."""

    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((logits_of(m, x, valid) * valid[..., None]).view(-1, CLASSES), labels.view(-1))

    labels = torch.randint(0, CLASSES, (BATCH, LENGTH))
    result = check(body, (hidden(), RIGHT, labels), None, packing=form, train=train, batches=[(hidden(), RIGHT, labels_for(RIGHT))])
    assert_packed(result, form, 2)


NONE_REDUCED = {
    "masked": lambda loss, v: (loss.view(v.shape) * v).sum() / v.sum(),
    "mean": lambda loss, v: loss.mean(),
}


@both_ways
@pytest.mark.parametrize("name", NONE_REDUCED)
def test_rule_02_no_reduction(name: str, form: str, train: bool) -> None:
    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits_of(m, x, valid).view(-1, CLASSES), labels.view(-1), reduction="none")
        return NONE_REDUCED[name](loss, valid)

    check(body, (hidden(), RIGHT, torch.randint(0, CLASSES, (BATCH, LENGTH))), None, packing=form, train=train)


SHIFTED = {
    "sliced, flattened": lambda y, t: F.cross_entropy(y[:, :-1].reshape(-1, CLASSES), t[:, 1:].reshape(-1)),
    "sliced from the end": lambda y, t: F.cross_entropy(
        y[..., :-1, :].contiguous().view(-1, CLASSES), t[..., 1:].contiguous().view(-1), reduction="sum"
    ),
    "cast": lambda y, t: F.cross_entropy(
        y[:, :-1].float().reshape(-1, CLASSES), t[:, 1:].reshape(-1), label_smoothing=0.1
    ).double(),
    "three dimensions": lambda y, t: F.cross_entropy(y[:, :-1].transpose(1, 2), t[:, 1:]),
    "padded labels": lambda y, t: F.cross_entropy(y.view(-1, CLASSES), F.pad(t, (0, 1), value=-100)[:, 1:].reshape(-1)),
}


@both_ways
@pytest.mark.parametrize("name", SHIFTED)
def test_rule_02_shifted(name: str, form: str, train: bool) -> None:
    """A decoder's loss: with right padding no padded row counts; with left padding the last one predicts the first token."""

    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        return SHIFTED[name](logits_of(m, x, valid), labels)

    given = [(hidden(), valid, labels_for(valid)) for valid in (RIGHT, mask_of("left"))]
    tolerance = 1e-5 if name == "cast" else None
    result = check(body, given[0], None, packing=form, train=train, batches=given[1:], tolerance=tolerance)
    if form == "model":
        assert (result.packed, result.padded, set(result.forms)) == (1, 1, {"packed"})


@both_ways
def test_rule_02_head_behind_the_slice(form: str, train: bool) -> None:
    """The slice may come before the head; what else reads it still gets a slice."""

    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x, causal(valid))
        loss = F.cross_entropy(m.head(y[:, :-1]).reshape(-1, CLASSES), labels[:, 1:].reshape(-1))
        return loss, F.cross_entropy(y[:, :-1].reshape(-1, WIDTH), labels[:, 1:].reshape(-1))

    result = check(body, (hidden(), RIGHT, labels_for(RIGHT)), None, packing=form, train=train)
    if form == "model":
        assert_packed(result, form)


@both_ways
def test_rule_02_other_slices(form: str, train: bool) -> None:
    """Slices that are no shift by one stay what they are."""

    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        y = logits_of(m, x, valid)
        two = F.cross_entropy(y[:, :-2].reshape(-1, CLASSES), labels[:, 2:].reshape(-1))
        later = F.cross_entropy(y[:, 1:].reshape(-1, CLASSES), labels[:, 1:].reshape(-1))
        return two + later + F.cross_entropy(y[:-1].reshape(-1, CLASSES), labels[1:].reshape(-1))

    assert_leaks(check(body, (hidden(), RIGHT, labels_for(RIGHT)), None, packing=form, train=train), "slice")


@pytest.mark.parametrize("where", ["the labels", "what they are made from"])
def test_rule_02_labels_written_in_place(where: str) -> None:
    """What the plan sees of an input is not what the graph sees once it has written to it."""

    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        if where == "the labels":
            labels[:] = 3
            target = labels
        else:
            target = labels.add_(103).clone()
        return F.cross_entropy(logits_of(m, x, valid).view(-1, CLASSES), target.view(-1))

    result = check(body, (hidden(), RIGHT, torch.full((BATCH, LENGTH), -100)), None)
    assert set(result.forms) == {"exact"}


# --- rule 3: reads of a position -------------------------------------------------------------------------------------

READS = {
    "first": (lambda m, y, v: m.linear(y[:, 0]).tanh(), {"right": 1, "left": 0, "holes": 0}),
    "last": (lambda m, y, v: y[:, -1], {"right": 0, "left": 1, "empty row": 0}),
    "first, kept": (lambda m, y, v: y[:, :1] * 2, {"right": 1, "left": 0}),
    "first two": (lambda m, y, v: y[:, :2].sum(1), {"right": 1, "left": 0}),
    "last two": (lambda m, y, v: y[:, -2:], {"right": 0, "left": 1}),
    "second to last": (lambda m, y, v: y[:, -2], {"left": 1, "right": 0}),
    "through views": (lambda m, y, v: y.view(BATCH, LENGTH, 2, -1).transpose(1, 2)[:, :, 0], {"right": 1, "left": 0}),
    "time first": (lambda m, y, v: y.transpose(0, 1)[0], {"right": 1, "left": 0}),
    "several reads": (lambda m, y, v: y[:, 0] + y[:, 1] * y[:, -12], {"right": 1, "left": 0}),
    "row-wise before and after": (lambda m, y, v: m.norm(m.linear(y))[:, 0].exp(), {"right": 1, "left": 0}),
    "last valid": (lambda m, y, v: y[torch.arange(BATCH), v.sum(1) - 1], {"right": 1, "left": 0, "empty row": 0}),
    "largest valid position": (lambda m, y, v: _last(y, v), {"right": 1, "left": 1, "holes": 1, "empty row": 0}),
    "gathered": (lambda m, y, v: y.gather(1, _place(v.sum(1) - 1)), {"right": 1, "left": 0}),
    "gathered, time first": (lambda m, y, v: y.transpose(0, 1).gather(0, _place(v.sum(1) - 1).swapdims(0, 1)), {"left": 0}),
    "gathered along heads": (
        lambda m, y, v: y.view(BATCH, LENGTH, 2, -1).transpose(1, 2).gather(2, _place(v.sum(1) - 1, 8)[:, None].repeat(1, 2, 1, 1)),
        {"right": 1},
    ),
    "gathered scores": (lambda m, y, v: m.score(y).squeeze(-1).gather(1, (v.sum(1, True) - 1)), {"right": 1}),
    "gathered, part of the features": (lambda m, y, v: y.gather(1, _place(v.sum(1) - 1, 5)).exp(), {"right": 1}),
    "gathered, part of the batch": (lambda m, y, v: y.gather(1, _place(v[:2].sum(1) - 1)), {"left": 0}),
    "taken along": (lambda m, y, v: torch.take_along_dim(y, (v.sum(1) - 1)[:, None, None], 1).squeeze(1), {"right": 1}),
    "gathered at its largest position": (
        lambda m, y, v: y.gather(1, _place((v * torch.arange(LENGTH)).argmax(1))), {"holes": 1, "empty row": 0},
    ),
    "one past the end": (lambda m, y, v: y[torch.arange(BATCH), v.sum(1) % LENGTH], {"right": 0, "left": 0}),
}


def _place(position: Tensor, width: int = WIDTH) -> Tensor:
    """An index of one position of each sequence, (B, 1, E)."""
    return position[:, None, None].expand(-1, 1, width)


def _last(y: Tensor, valid: Tensor) -> Tensor:
    return y[torch.arange(BATCH), (valid * torch.arange(LENGTH)).argmax(1)]


def two_at_the_end(mask: str) -> Tensor:
    """Padding on one side, and at least two valid positions on the other."""
    position = torch.arange(LENGTH)
    return mask_of(mask) | {"right": position < 2, "left": position >= LENGTH - 2}[mask]


@both_ways
@pytest.mark.parametrize(("name", "mask"), [(name, mask) for name, (_, masks) in READS.items() for mask in masks])
def test_rule_03_reads(name: str, mask: str, form: str, train: bool) -> None:
    """A read of some positions is packed where they are valid in every row, and else runs padded."""
    tail, packs = READS[name]
    valid = two_at_the_end(mask) if mask in ("right", "left") else mask_of(mask)
    result = check(lambda m, x, v: tail(m, m.a(x, keys(v)), v), (hidden(), valid), None, packing=form, train=train)
    if form == "model":
        assert set(result.forms) == {"packed"}
        assert (result.packed, result.padded) == (packs[mask], 1 - packs[mask])
        assert "is valid" in result.reasons
    else:
        assert_leaks(result, "may be read")


@pytest.mark.parametrize("batch", [1, BATCH])
def test_rule_03_many_gathered_positions(batch: int) -> None:
    """Pointers into padding, as models have that predict a few words: a fact that rarely holds would let all run padded."""

    def body(m: Any, x: Tensor, valid: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        y = m.b(m.linear(m.a(x, keys(valid))), keys(valid))
        return y.gather(1, places[..., None].expand(-1, -1, WIDTH)), y

    valid, places = mask_of("holes", batch), torch.randint(0, LENGTH, (batch, 3))
    valid[0, 2:9] = False
    places[:, -1] = 2
    result = check(body, (hidden(batch), valid, places), (None, valid))
    assert_leaks(result, "gather")
    assert result.padded == 0, result.report.table()
    assert "is valid" not in result.reasons


@both_ways
def test_rule_03_pooler_beside_tokens(form: str, train: bool) -> None:
    """BERT returns all tokens and a pooled first one."""

    def body(m: Any, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        y = m.b(m.norm(m.a(x, keys(valid))), keys(valid))
        return y, m.linear(y[:, 0]).tanh()

    result = check(
        body, (hidden(), RIGHT), (None, None) if form == "attention" else (RIGHT, None), packing=form, train=train,
        batches=[] if form == "attention" else [(hidden(), RIGHT)],
    )  # fmt: skip
    assert result.packed == (2 if form == "model" else 0)


@both_ways
def test_rule_03_a_read_that_the_model_decides(form: str, train: bool) -> None:
    """Which position is read is known only when the model has run: nothing the plan could look at."""

    def body(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        y = m.a(x, keys(valid))
        return m.b(y, keys(valid))[torch.arange(BATCH), y.sum(-1).argmax(1)]

    model = Program(body)
    if not train:
        model.requires_grad_(False)
    result = check(model, (hidden(grad=train), RIGHT), None, packing=form, train=train)
    assert_leaks(result, "index" if form == "model" else "may be read")


@pytest.mark.parametrize("length", [2, 3])
def test_rule_03_shorter_than_the_slice(length: int) -> None:
    """``[:, :4]`` of fewer positions reads them all, with dynamic sizes too."""
    for dynamic in (None, True):
        given = [(hidden(length=n), mask_of("right", length=n)) for n in (length, 9)]
        check(lambda m, x, v: m.a(x, keys(v))[:, :4].sum(1), given[1], None, dynamic=dynamic, batches=given[:1])


# --- rule 12: outputs along the positions ----------------------------------------------------------------------------


ALONG = {
    "span scores": lambda m, y, v: m.score(y).squeeze(-1),
    "two span scores": lambda m, y, v: m.head(y)[..., :2].split(1, -1)[0].squeeze(-1),
    "channels first": lambda m, y, v: y.transpose(1, 2),
    "pairs of positions": lambda m, y, v: y @ y.transpose(1, 2),
    "classes": lambda m, y, v: m.head(y).argmax(-1),
    "flipped": lambda m, y, v: y.flip(1),
}


@both_ways
@pytest.mark.parametrize("name", ALONG)
def test_rule_12_exact_rows(name: str, form: str, train: bool) -> None:
    result = check(lambda m, x, v: ALONG[name](m, m.a(x, keys(v)), v), (hidden(), RIGHT), None, packing=form, train=train)
    assert set(result.forms) == {"exact"}


@pytest.mark.parametrize("form", FORMS)
def test_rule_12_argmax_over_positions(form: str) -> None:
    """Were padded scores zero, one of them would be the largest."""

    class Span(Program):
        def __init__(self) -> None:
            super().__init__(lambda m, x, v: m.score(m.a(x, keys(v))).squeeze(-1))
            nn.init.constant_(self.score.bias, -50.0)

    result = check(Span(), (hidden(), RIGHT), None, packing=form)
    assert result.ours is not None and result.eager is not None
    assert torch.equal(result.ours.outputs[0].argmax(1), result.eager.outputs[0].argmax(1))
