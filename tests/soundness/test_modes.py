"""The contract under grad modes, autocast, dropout, dynamic sizes, a real inner compiler, and with ``config.debug``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from soundness.harness import (
    BATCH,
    FORMS,
    HEADS,
    LENGTH,
    WIDTH,
    Program,
    assert_packed,
    both_ways,
    causal,
    check,
    direct_backend,
    hidden,
    keys,
    mask_of,
    quick,
)
from varlen_inductor import report

RIGHT = mask_of("right")


def heads_of(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return m.a.qkv(x).view(BATCH, LENGTH, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)


# --- grad modes ------------------------------------------------------------------------------------------------------


def _pack_first_used_without_grad(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    z = m.conv(x.transpose(1, 2)).transpose(1, 2)
    with torch.no_grad():
        gate = m.norm(z).sigmoid()
    return m.a(m.linear(z) * gate, keys(valid))


def _mask_made_without_grad(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    query, key, value = heads_of(m, m.norm(x))
    with torch.no_grad():
        mask = (valid.long().cumsum(1) > 0) & valid
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=keys(mask))
    return m.linear(y.transpose(1, 2).reshape(x.shape))


def _mask_sorted_without_grad(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    query, key, value = heads_of(m, m.norm(x))
    with torch.no_grad():
        mask = valid.long().sort(1, descending=True)[0] > 0
        frozen = F.scaled_dot_product_attention(query, key, value, attn_mask=keys(mask))
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=keys(mask)) + frozen
    return m.linear(y.transpose(1, 2).reshape(x.shape))


def _teacher(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    """The same layers without gradients, and then with."""
    with torch.no_grad():
        teacher = m.linear(m.a(x, keys(valid)))
    student = m.linear(m.a(x, keys(valid)))
    return student + (student - teacher.detach() * 0.5).pow(2)


def _detached(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    y = m.a(x, keys(valid))
    return y + m.linear(y.detach()) * y.detach()


GRAD_MODES = [_pack_first_used_without_grad, _mask_made_without_grad, _mask_sorted_without_grad, _teacher, _detached]


@both_ways
@pytest.mark.parametrize("body", GRAD_MODES, ids=lambda body: body.__name__)
def test_no_grad_inside(body: Any, form: str, train: bool) -> None:
    """What is packed under one grad mode is not used under another as if it had been packed there."""
    result = check(body, (hidden(), RIGHT), RIGHT, packing=form, train=train)
    assert set(result.forms) <= {"packed", "zero rows"}
    assert result.forms


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "frozen"])
def test_no_gradients_at_all(mode: str, form: str) -> None:
    body = lambda m, x, v: (m.b(m.norm(m.a(x, keys(v))), keys(v)) * v[..., None]).sum(1)  # noqa: E731
    model = Program(body).double()
    if mode == "frozen":
        model.requires_grad_(False)
        assert_packed(check(model, (hidden(), RIGHT), None, packing=form), form)
        return
    x = hidden(grad=False)
    with quick(packing=form), getattr(torch, mode)():
        compiled = torch.compile(model, backend=direct_backend)
        torch.testing.assert_close(compiled(x, RIGHT), model(x, RIGHT))
    assert report.recent()[-1].rewritten


@pytest.mark.parametrize("form", FORMS)
def test_some_parameters_frozen(form: str) -> None:
    """The gradient passes through frozen layers to the trained ones."""
    model = Program(lambda m, x, v: m.b(m.linear(m.a(x, keys(v))), keys(v)))
    for part in (model.a, model.linear):
        part.requires_grad_(False)
    assert_packed(check(model, (hidden(), RIGHT), RIGHT, packing=form), form)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_accumulate(form: str) -> None:
    model = Program(lambda m, x, v: m.b(m.linear(m.a(x, keys(v))), keys(v))).double()
    batches = [(hidden(), mask_of(kind)) for kind in ("right", "left", "holes")]
    totals = []
    with quick(packing=form):
        for call in (model, torch.compile(model, backend=direct_backend)):
            model.zero_grad()
            for x, valid in batches:
                (call(x, valid) * valid[..., None]).pow(2).sum().backward()
            totals.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*totals)


# --- autocast --------------------------------------------------------------------------------------------------------


def _autocast_inside(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    y = m.norm(m.conv(x.transpose(1, 2)).transpose(1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        z = m.a(m.linear(y), keys(valid))
    with torch.autocast("cpu", enabled=False):
        return m.linear(y) + m.b(z.float(), keys(valid))


@both_ways
def test_autocast_inside(form: str, train: bool) -> None:
    """A value that is packed for the part under autocast keeps its dtype for the part outside."""
    result = check(_autocast_inside, (hidden(), RIGHT), RIGHT, packing=form, train=train, dtype=torch.float32, tolerance=3e-2)
    assert set(result.forms) <= {"packed", "zero rows"}
    assert len(result.forms) == 2


@both_ways
def test_autocast_outside(form: str, train: bool) -> None:
    def body(m: Any, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        y = m.b(m.norm(m.a(x, causal(valid))), keys(valid))
        return y, (y * valid[..., None]).float().sum(1)

    with torch.autocast("cpu", torch.bfloat16):
        result = check(body, (hidden(), RIGHT), (RIGHT, None), packing=form, train=train, dtype=torch.float32, tolerance=4e-2)
    assert_packed(result, form)


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_dropout_in_a_region(form: str) -> None:
    """Each kept value is scaled by 1 / (1 - p), the share of dropped ones is p, and a seed reproduces them, backward too."""
    model = Program(lambda m, x, v: (F.dropout(m.norm(m.a(x, keys(v))) + 3, 0.25, m.training), m.norm(m.a(x, keys(v))) + 3)).train()
    valid = torch.ones(64, 20, dtype=torch.bool)
    valid[:, 15:] = False
    valid[::2, 4:] = False
    x = torch.randn(64, 20, WIDTH)
    runs = []
    with quick(packing=form):
        compiled = torch.compile(model, backend=direct_backend)
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            model.zero_grad()
            dropped, plain = compiled(x, valid)
            (dropped * valid[..., None]).sum().backward()
            runs.append((dropped.detach(), model.norm.bias.grad.clone()))
    assert report.recent()[-1].rewritten
    dropped, gradient = runs[0]
    ratio = (dropped / plain.detach())[valid]
    kept = ratio > 0.5
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.75))
    assert not ratio[~kept].any()
    assert abs(kept.double().mean().item() - 0.75) < 0.02
    torch.testing.assert_close(gradient, kept.view(-1, WIDTH).sum(0) / 0.75)
    assert torch.equal(runs[0][0][valid], runs[1][0][valid])
    assert not torch.equal(runs[0][0][valid], runs[2][0][valid])


# --- sizes -----------------------------------------------------------------------------------------------------------


@both_ways
def test_dynamic_sizes(form: str, train: bool) -> None:
    """One graph for batches of several shapes; means, reads, losses and an exact attention in it."""

    def body(m: Any, x: Tensor, valid: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        b, s, _ = x.shape
        y = m.b(m.norm(m.a(x, causal(valid))), keys(valid))
        pooled = (y * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        loss = F.cross_entropy(m.head(y)[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
        return y, y.view(b, s, HEADS, -1).transpose(1, 2), pooled, loss, y.reshape(b * s, -1)

    def batch(b: int, s: int) -> tuple[Tensor, ...]:
        lengths = torch.randint(1, s // 2 + 1, (b,))
        valid = torch.arange(s) < lengths[:, None]
        labels = torch.randint(0, 7, (b, s)).masked_fill(~valid, -100)
        labels[:, 1] = torch.where(valid[:, 1], labels[:, 1], -100)
        return hidden(b, s), valid, labels

    first, *others = [batch(b, s) for b, s in ((3, 12), (4, 10), (2, 16), (5, 8))]
    torch._dynamo.reset()
    for given in (first, *others):
        valid = given[1]
        rows = (valid, valid[:, None].expand(-1, HEADS, -1), None, None, valid)
        result = check(body, given, rows, packing=form, train=train, dynamic=True)
        assert set(result.forms) == ({"packed"} if form == "model" else {"exact"}), result.report.table()


# --- the real road ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_inside(inner: str, form: str) -> None:
    """The body and the padded graph go through a compiler of their own, and are not run eagerly without a word."""

    def body(m: Any, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        y = m.b(m.norm(m.a(x, keys(valid))), keys(valid))
        return y, (y * valid[..., None]).sum(1)

    result = check(body, (hidden(), RIGHT), (RIGHT, None), packing=form, inner=inner)
    assert_packed(result, form)
    if inner == "aot_eager":
        assert counters["aot_autograd"]["total"] >= 1
        assert counters["aot_autograd"]["ok"] == counters["aot_autograd"]["total"]
    for valid in map(mask_of, ("left", "all", "holes", "none")):
        check(body, (hidden(), valid), (valid, None), packing=form, inner=inner)


# --- config.debug ----------------------------------------------------------------------------------------------------


def tokens_and_pool(m: Any, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    y = m.linear(m.a(x, keys(valid)))
    return (y * valid[..., None]).sum(1), y.view(-1, WIDTH)


@pytest.mark.parametrize("inner", [None, "aot_eager"])
@pytest.mark.parametrize("form", FORMS)
def test_debug_finds_a_loss_outside(form: str, inner: str | None) -> None:
    """A loss over all rows of an output raises in the backward, and says which output."""
    from varlen_inductor.backend import varlen_inductor

    model = Program(tokens_and_pool).double()
    given = (hidden(), RIGHT)
    knobs = {"packing": form, "debug": True} | ({} if inner is None else {"inner_backend": inner})
    with quick(**knobs):
        compiled = torch.compile(model, backend=direct_backend if inner is None else varlen_inductor)
        pooled, tokens = compiled(*given)
        ((tokens * RIGHT.reshape(-1, 1)).pow(2).sum() + pooled.sum()).backward()
        padded = int((~RIGHT).sum())
        with pytest.raises(RuntimeError, match=rf"output 1 .*is not zero in {padded} of its {padded} padded rows.*padded_rows"):
            (compiled(*given)[1] + 1).pow(2).mean().backward()
    assert report.recent()[-1].rewritten


@pytest.mark.parametrize("form", FORMS)
def test_debug_is_quiet(form: str) -> None:
    """No check where rows are exact or known, where the loss is masked, and none at all without ``config.debug``."""
    model = Program(lambda m, x, v: m.a(x, keys(v)).masked_fill(~v[..., None], 2.0)).double()
    given = (hidden(), RIGHT)
    with quick(packing=form, debug=True), report.collect() as reports:
        torch.compile(model, backend=direct_backend)(*given).sum().backward()
        torch._dynamo.reset()
        exact = Program(lambda m, x, v: m.a(x, keys(v))).double()
        with quick(packing=form, debug=True, padded_rows="keep"):
            torch.compile(exact, backend=direct_backend)(*given).sum().backward()
    assert all("watch_padded_rows" not in one.graph_after for one in reports)
    torch._dynamo.reset()
    with quick(packing=form), report.collect() as reports:
        torch.compile(exact, backend=direct_backend)(*given).sum().backward()
    assert reports[0].graph_after
    assert "watch_padded_rows" not in reports[0].graph_after
    check(exact, given, RIGHT, packing=form, knobs={"debug": True})
