"""Operators that look at one token at a time and need not look like it: lookups, gates, losses of elements, losses of labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundness.harness import (
    FORMS,
    LENGTH,
    WIDTH,
    Program,
    assert_leaks,
    assert_packed,
    both_ways,
    check,
    hidden,
    keys,
    mask_of,
    poisoned,
)

CLASSES, WORDS, BOOKS = 7, 50, 2
NOWHERE = 10**6
"""No index of any table: whoever looks up what padding holds finds out."""
BATCH = 4
VALID = torch.cat([mask_of(kind, 3)[1:2] for kind in ("right", "left", "holes", "empty row")])
VALID[2, [2, 3, 4, 7, 8, 11]] = False
"""A sequence with each kind of padding."""
ALONE = VALID[2:3]


def spoiled(ids: Tensor, valid: Tensor) -> Tensor:
    """``ids`` with indices of nothing at padded positions."""
    return ids.masked_fill(~valid.view(*valid.shape, *[1] * (ids.dim() - 2)), NOWHERE)


def words(batch: int = BATCH, below: int = WORDS) -> Tensor:
    return torch.randint(0, below, (batch, LENGTH))


# --- lookups ---------------------------------------------------------------------------------------------------------


def rotary(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Positions look up their angles, as models that are given ``position_ids`` do."""
    angle = torch.arange(WORDS, dtype=x.dtype)[:, None] * (0.5 ** torch.arange(WIDTH // 2, dtype=x.dtype))[None]
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    one, two = x.chunk(2, -1)
    return x * cos[ids] + torch.cat([-two, one], -1) * sin[ids]


LOOKUPS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "rows of a parameter": lambda m, x, ids: x + m.embed.weight[ids],
    "rotary": rotary,
    "second dimension": lambda m, x, ids: x + m.embed.weight.t()[:, ids].permute(1, 2, 0),
    "between two dimensions": lambda m, x, ids: (
        x + m.embed.weight.view(WORDS, 2, -1).transpose(0, 1)[:, ids].permute(1, 2, 0, 3).flatten(2)
    ),
    "flattened": lambda m, x, ids: x + m.embed.weight[ids.view(-1)].view(x.shape),
    "channels first": lambda m, x, ids: (x.transpose(1, 2) + m.embed.weight[ids].transpose(1, 2)).transpose(1, 2),
    "from the end": lambda m, x, ids: x * m.embed.weight[ids - WORDS],
    "int32": lambda m, x, ids: x + m.embed.weight[ids.int()],
    "several per token": lambda m, x, ids: x + m.embed.weight[torch.stack([ids, ids // 2], -1)].sum(2),
    "numbers, then rows": lambda m, x, ids: x + m.embed(torch.arange(WORDS).flip(0)[ids]),
    "one number per token": lambda m, x, ids: x * m.embed.weight[:, 0][ids][..., None],
    "features": lambda m, x, ids: x[..., torch.arange(WIDTH - 1, -1, -1)] + m.embed.weight[ids],
    "features in pairs": lambda m, x, ids: x[..., torch.arange(WIDTH).view(2, -1)].flatten(2) + m.embed.weight[ids],
}


def around_attention(looks: Sequence[Callable[[Any, Tensor, Tensor], Tensor]]) -> Callable[..., Tensor]:
    def body(m: Any, x: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
        for look in looks:
            x = look(m, x, ids)
        y = m.linear(m.a(m.norm(x), keys(valid)))
        for look in looks:
            y = look(m, y, ids)
        return y

    return body


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups(name: str) -> None:
    """Indices of padding are not looked up at all."""
    x, ids = hidden(BATCH), words()
    given = (poisoned(x, VALID), spoiled(ids, VALID), VALID)
    assert_packed(check(around_attention([LOOKUPS[name]]), given, VALID, clean=(x, ids, VALID)), "model")


@both_ways
@pytest.mark.parametrize("valid", [VALID, ALONE], ids=["several", "one"])
def test_all_lookups(valid: Tensor, form: str, train: bool) -> None:
    given = (hidden(len(valid)), words(len(valid)), valid)
    result = check(around_attention(list(LOOKUPS.values())), given, valid, packing=form, train=train)
    assert_packed(result, form)


NOT_LOOKED_UP: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "other rows": lambda m, y, ids, v: y.view(-1, WIDTH)[ids.view(-1) % (BATCH * LENGTH)].view(y.shape),
    "other positions": lambda m, y, ids, v: y[:, torch.arange(LENGTH - 1, -1, -1)],
    "other sequences": lambda m, y, ids, v: y[torch.arange(BATCH - 1, -1, -1)],
    "by a mask": lambda m, y, ids, v: y + m.embed.weight[: 2 * WIDTH][torch.arange(2 * WIDTH) % 2 == 0].sum(0) + y.mean(1, True),
    "features by a mask": lambda m, y, ids, v: y[..., torch.arange(WIDTH) % 2 == 0].repeat(1, 1, 2),
    "a table of positions": lambda m, y, ids, v: y + y.mean(-1)[:, ids[0] % LENGTH][..., None],
}


@pytest.mark.parametrize("name", NOT_LOOKED_UP)
def test_lookups_in_tokens(name: str) -> None:
    """Where the table holds tokens itself, rows of others are read."""

    def body(m: Any, x: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
        return NOT_LOOKED_UP[name](m, m.linear(m.a(x, keys(valid))), ids, valid) * 2

    result = check(body, (hidden(BATCH), words(), VALID), None)
    assert set(result.forms) == {"exact"}, result.report.table()


@pytest.mark.parametrize("valid", [VALID, ALONE], ids=["several", "one"])
def test_an_index_that_is_looked_up_in_itself(valid: Tensor) -> None:
    """Padded rows of a pointer are read through pointers of valid rows."""

    def body(m: Any, ids: Tensor, valid: Tensor) -> Tensor:
        pointer = ids * 1
        flat = pointer.view(-1)
        one, two = pointer.gather(1, pointer), flat[flat].view(ids.shape)
        return m.a(m.embed(pointer), keys(valid)) + m.embed(one) + m.embed(two)

    check(body, (words(len(valid), LENGTH), valid), valid)


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_that_a_literal_looks_up(form: str) -> None:
    """The rows of a mask in another order, which the model has written down."""
    order = [2, 0, 3, 1]
    result = check(lambda m, x, v: m.a(x, keys(v[torch.tensor(order)])), (hidden(BATCH), VALID), VALID[order], packing=form)
    assert_packed(result, form)


# --- gates and convolutions ------------------------------------------------------------------------------------------

GATES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "features": lambda m, y: F.glu(torch.cat([y, m.linear(y)], -1)),
    "heads": lambda m, y: F.glu(y.view(*y.shape[:2], 4, -1), 2).flatten(2).repeat(1, 1, 2),
    "channels first": lambda m, y: F.glu(torch.cat([y, m.linear(y)], -1).transpose(1, 2), 1).transpose(1, 2),
    "convolution of one": lambda m, y: m.one(y.transpose(1, 2)).transpose(1, 2),
    "gated convolution": lambda m, y: F.glu(m.two(y.transpose(1, 2)), 1).transpose(1, 2),
    "flat convolution": lambda m, y: m.flat(y.transpose(1, 2)[:, :, None]).squeeze(2).transpose(1, 2),
}


class Gates(Program):
    """Convolutions that see one position at a time."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__(body)
        self.one, self.two = nn.Conv1d(WIDTH, WIDTH, 1), nn.Conv1d(WIDTH, 2 * WIDTH, 1, bias=False)
        self.flat = nn.Conv2d(WIDTH, WIDTH, 1)


def gated(gates: Sequence[Callable[[Any, Tensor], Tensor]]) -> Gates:
    def body(m: Any, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        for gate in gates:
            x = gate(m, x)
        y = m.a(x, keys(valid))
        for gate in gates:
            y = gate(m, y)
        return y, (y * valid[..., None]).sum(1)

    return Gates(body)


@pytest.mark.parametrize("name", GATES)
def test_gates(name: str) -> None:
    x = hidden(BATCH)
    result = check(gated([GATES[name]]), (poisoned(x, VALID), VALID), (VALID, None), clean=(x, VALID))
    assert_packed(result, "model")


@both_ways
@pytest.mark.parametrize("valid", [VALID, ALONE], ids=["several", "one"])
def test_all_gates(valid: Tensor, form: str, train: bool) -> None:
    model = gated(list(GATES.values()))
    assert_packed(check(model, (hidden(len(valid)), valid), (valid, None), packing=form, train=train), form)


# --- losses of elements ----------------------------------------------------------------------------------------------

Loss = Callable[..., Tensor]
ELEMENTS: dict[str, Loss] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth l1": lambda y, t, **options: F.smooth_l1_loss(y, t, beta=0.3, **options),
    "huber": lambda y, t, **options: F.huber_loss(y, t, delta=0.3, **options),
    "binary": lambda y, t, **options: F.binary_cross_entropy(y.sigmoid(), t.sigmoid(), **options),
    "binary, of logits": lambda y, t, **options: F.binary_cross_entropy_with_logits(
        y, t.sigmoid(), pos_weight=torch.linspace(1, 2, y.shape[-1], dtype=y.dtype), **options
    ),
    "divergence": lambda y, t, **options: F.kl_div(y.log_softmax(-1), t.log_softmax(-1), log_target=True, **options),
    "soft margin": lambda y, t, **options: F.soft_margin_loss(y, t.detach().sign(), **options),
    "poisson": lambda y, t, **options: F.poisson_nll_loss(y, t.abs(), full=True, **options),
    "broadcast": lambda y, t, **options: F.mse_loss(y, t[..., :1].expand(-1, -1, y.shape[-1]), **options),
}


def masked_mean_of(losses: Sequence[Loss]) -> Callable[..., Tensor]:
    def body(m: Any, x: Tensor, valid: Tensor, target: Tensor) -> Tensor:
        y = m.linear(m.a(x, keys(valid)))
        loss = sum(of(y, target, reduction="none") for of in losses)
        return (loss * valid[..., None]).sum() / valid.sum()

    return body


@pytest.mark.parametrize("name", ELEMENTS)
def test_losses_of_elements(name: str) -> None:
    """Without a reduction they are row-wise; a masked sum of them needs no padded row."""
    x, target = hidden(BATCH), hidden(BATCH, grad=False)
    given = (poisoned(x, VALID), VALID, poisoned(target, VALID))
    assert_packed(check(masked_mean_of([ELEMENTS[name]]), given, None, clean=(x, VALID, target)), "model")


@both_ways
def test_all_losses_of_elements(form: str, train: bool) -> None:
    given = (hidden(BATCH), VALID, hidden(BATCH))
    assert_packed(check(masked_mean_of(list(ELEMENTS.values())), given, None, packing=form, train=train), form)


REDUCED = [("mse", "mean"), ("mse", "sum"), ("l1", "mean"), ("smooth l1", "sum"), ("huber", "mean"), ("binary", "mean")]


@pytest.mark.parametrize(("name", "reduction"), REDUCED)
def test_reduced_losses(name: str, reduction: str) -> None:
    """With a reduction they need what the same reduction of a tensor needs: nothing of rows that are known."""

    def masked(m: Any, x: Tensor, valid: Tensor, target: Tensor) -> Tensor:
        y, at = m.linear(m.a(x, keys(valid))), valid[..., None]
        if name == "binary":
            return F.binary_cross_entropy(y.sigmoid() * at, target.sigmoid() * at, reduction=reduction)
        return ELEMENTS[name](y * at, target * at, reduction=reduction)

    def unmasked(m: Any, x: Tensor, valid: Tensor, target: Tensor) -> Tensor:
        return ELEMENTS[name](m.linear(m.a(x, keys(valid))), target * valid[..., None], reduction=reduction)

    given = (hidden(BATCH), VALID, hidden(BATCH))
    assert_packed(check(masked, given, None), "model")
    assert_leaks(check(unmasked, given, None), reduction)


# --- losses of labels ------------------------------------------------------------------------------------------------


def scores(m: Any, y: Tensor, copies: int = 1) -> Tensor:
    """Logits (B, S, C), or (B, S, K, C)."""
    several = torch.stack([m.head(y * (1 + k)) for k in range(copies)], 2)
    return several.squeeze(2) if copies == 1 else several


def weights(y: Tensor) -> Tensor:
    return torch.linspace(0.5, 2, CLASSES, dtype=y.dtype)


def of_labels(y: Tensor, t: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(y, t, reduction="none", **options)


LABELS: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "flattened": (1, lambda y, t: of_labels(y.view(-1, CLASSES), t.view(-1)).view(t.shape)),
    "classes second": (1, lambda y, t: of_labels(y.transpose(1, 2), t)),
    "weighted": (1, lambda y, t: of_labels(y.transpose(1, 2), t, weight=weights(y))),
    "smoothed": (1, lambda y, t: of_labels(y.view(-1, CLASSES), t.view(-1), label_smoothing=0.2, weight=weights(y)).view(t.shape)),
    "some ignored": (1, lambda y, t: of_labels(y.transpose(1, 2), t, ignore_index=3)),
    "in float32": (1, lambda y, t: of_labels(y.float().view(-1, CLASSES), t.view(-1)).view(t.shape).double()),
    "log likelihood": (1, lambda y, t: F.nll_loss(y.log_softmax(-1).transpose(1, 2), t, weight=weights(y), reduction="none")),
    "flat log likelihood": (
        1, lambda y, t: F.nll_loss(y.log_softmax(-1).flatten(0, 1), t.view(-1), reduction="none").view(t.shape),
    ),
    "books": (BOOKS, lambda y, t: of_labels(y.view(-1, CLASSES), t.view(-1)).view(t.shape).sum(-1)),
    "books, classes second": (BOOKS, lambda y, t: of_labels(y.permute(0, 3, 1, 2), t).mean(-1)),
    "books and classes first": (BOOKS, lambda y, t: of_labels(y.permute(2, 3, 0, 1), t.permute(2, 0, 1)).sum(0)),
    "probabilities": (1, lambda y, t: of_labels(y.transpose(1, 2), F.one_hot(t % CLASSES, CLASSES).to(y.dtype).transpose(1, 2))),
    "flat probabilities": (
        1, lambda y, t: of_labels(y.view(-1, CLASSES), F.one_hot(t % CLASSES, CLASSES).to(y.dtype).view(-1, CLASSES)).view(t.shape),
    ),
}  # fmt: skip


def mean_of_valid(losses: Sequence[tuple[int, Callable[[Tensor, Tensor], Tensor]]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x, keys(valid))
        loss = sum(of(scores(m, y, copies), labels if copies > 1 else labels[..., 0]) for copies, of in losses)
        return (loss * valid).sum() / valid.sum(), loss.masked_fill(~valid, 0.5).sum(1)

    return body


def labels_of(valid: Tensor) -> Tensor:
    return torch.randint(0, CLASSES, (*valid.shape, BOOKS))


@pytest.mark.parametrize("name", LABELS)
def test_losses_of_labels(name: str) -> None:
    """Each position has a loss of its own: the mean over valid ones needs no padded row, whatever its label."""
    x, labels = hidden(BATCH), labels_of(VALID)
    given = (poisoned(x, VALID), VALID, spoiled(labels, VALID))
    tolerance = 1e-5 if name == "in float32" else None
    result = check(mean_of_valid([LABELS[name]]), given, None, clean=(x, VALID, labels), tolerance=tolerance)
    assert_packed(result, "model")


@both_ways
@pytest.mark.parametrize("valid", [VALID, ALONE], ids=["several", "one"])
def test_all_losses_of_labels(valid: Tensor, form: str, train: bool) -> None:
    given = (hidden(len(valid)), valid, labels_of(valid))
    result = check(mean_of_valid(list(LABELS.values())), given, None, packing=form, train=train, tolerance=1e-5)
    assert_packed(result, form)


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "rolled": lambda ids: ids.roll(-1, 1),
    "padded": lambda ids: F.pad(ids[:, 1:], (0, 1)),
    "rolled back": lambda ids: ids.roll(1, 1),
}


@pytest.mark.parametrize("valid", [VALID, ALONE], ids=["several", "one"])
@pytest.mark.parametrize("layout", ["flattened", "classes second"])
@pytest.mark.parametrize("name", MOVED)
def test_labels_that_were_moved(name: str, layout: str, valid: Tensor) -> None:
    """The embedding ties the labels to the tokens, and each is that of a neighbour: rows of labels are not packed with tokens."""
    _, loss_of = LABELS[layout]

    def body(m: Any, ids: Tensor, valid: Tensor) -> Tensor:
        loss = loss_of(scores(m, m.a(m.embed(ids), keys(valid))), MOVED[name](ids))
        return (loss * valid).sum() / valid.sum()

    assert_packed(check(body, (words(len(valid), CLASSES), valid), None), "model")


BIASED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "convolution": lambda y, w, b: F.conv1d(y.transpose(1, 2), w[..., None], b).transpose(1, 2),
    "wider convolution": lambda y, w, b: F.conv1d(y.transpose(1, 2), w[..., None].repeat(1, 1, 3), b, padding=1).transpose(1, 2),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BIASED)
def test_a_bias_that_depends_on_tokens(name: str, form: str) -> None:
    """As many outputs as positions, and a bias of each that some position gives: every row of the result reads all of them."""

    def body(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        y = m.a(x, keys(valid))
        made = BIASED[name](y, m.embed.weight[:LENGTH], y.pow(2).sum(-1)[0])
        return (made * valid[..., None]).sum(1)

    result = check(body, (hidden(1), ALONE), None, packing=form)
    assert set(result.forms) == {"exact"}, result.report.table()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_weights_of_classes_that_depend_on_tokens(reduction: str, form: str) -> None:
    """As many classes as positions, and a weight of each that some position gives: every row of the loss reads all of them."""

    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        y = m.a(x, keys(valid))
        weight = y.pow(2).sum(-1)[0].detach()
        logits = F.linear(y, m.linear.weight[:LENGTH]).view(-1, LENGTH)
        loss = F.cross_entropy(logits, labels.view(-1), weight=weight, reduction=reduction)
        return (loss * valid[0]).sum() if reduction == "none" else loss

    labels = words(1, LENGTH)
    labels = labels if reduction == "none" else labels.masked_fill(~ALONE, -100)
    result = check(body, (hidden(1), ALONE, labels), None, packing=form)
    assert set(result.forms) == {"exact"}, result.report.table()


def test_mean_over_all_positions() -> None:
    """The loss of padding counts where nobody leaves it out."""

    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        return of_labels(scores(m, m.a(x, keys(valid))).transpose(1, 2), labels).mean()

    assert_leaks(check(body, (hidden(BATCH), VALID, words(below=CLASSES)), None), "mean")


@both_ways
def test_reduced_log_likelihood(form: str, train: bool) -> None:
    """As cross entropy: padding that is ignored is not needed, which the plan looks for."""

    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        y = scores(m, m.a(x, keys(valid))).log_softmax(-1)
        flat = F.nll_loss(y.view(-1, CLASSES), labels.view(-1), weight=weights(y), ignore_index=2)
        return flat, F.nll_loss(y.transpose(1, 2), labels, reduction="sum", ignore_index=2)

    labels = words(below=CLASSES)
    given = [(hidden(BATCH), VALID, labels.masked_fill(~VALID, ignored)) for ignored in (2, 3)]
    result = check(body, given[0], None, packing=form, train=train, batches=given[1:])
    if form == "model":
        assert (result.packed, result.padded, set(result.forms)) == (1, 1, {"packed"})
    else:
        assert_leaks(result, "may be read")
