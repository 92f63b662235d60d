"""Training: steps of an optimizer, accumulation, mixed precision, frozen parameters, dropout, recomputation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed_models import (
    LENGTHS,
    Blocks,
    S,
    assert_gradients_close,
    assert_rows_close,
    compare_with_eager,
    compile_,
    feature_batch,
    graphs_compiled,
    packing,
    steps,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from varlen_inductor import _compat, report


class Tagger(nn.Module):
    """Blocks between an embedding and a classifier of each token, with the loss inside."""

    def __init__(self, dropout: float = 0.0, classes: int = 7) -> None:
        super().__init__()
        self.embed, self.blocks, self.classify = nn.Embedding(50, 32), Blocks(dropout=dropout), nn.Linear(32, classes)

    def forward(self, tokens: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """All (B, S). Returns the loss, 0-d, and logits (B, S, classes)."""
        logits = self.classify(self.blocks(self.embed(tokens), attention_mask))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def tagged_batch(lengths: list[int]) -> dict[str, Tensor]:
    """Tokens whose class is their number modulo 7, so that there is something to learn."""
    valid = feature_batch(lengths)["attention_mask"]
    tokens = torch.randint(50, valid.shape)
    return {"tokens": tokens, "attention_mask": valid, "labels": torch.where(valid, tokens % 7, -100)}


def tagged_batches(number: int) -> list[dict[str, Tensor]]:
    return [tagged_batch([int(n) for n in torch.randint(1, S, (3,))]) for _ in range(number)]


def losses(
    call: Callable[..., Any], model: nn.Module, batches: list[dict[str, Tensor]], *, accumulate: int = 1, autocast: bool = False
) -> list[float]:
    """The loss of each batch while the model is trained on them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    curve = []
    for step, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = call(**batch)
        (loss / accumulate).backward()
        curve.append(loss.item())
        if (step + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return curve


@pytest.mark.parametrize(("inner", "accumulate"), [("varlen_recorded", 3), ("inductor", 1)])
def test_loss_curve_follows_eager(inner: str, accumulate: int) -> None:
    model, batches = Tagger(), tagged_batches(12)
    ours = copy.deepcopy(model)
    with packing(inner):
        found = losses(compile_(ours), ours, batches, accumulate=accumulate)
    expected = losses(model, model, batches, accumulate=accumulate)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found[-1] < found[0]
    assert steps() == (12, 0) and graphs_compiled() == 1


# --- mixed precision -----------------------------------------------------------------------------------------------------------


class Inside(nn.Module):
    """Autocast is entered by the model, for its blocks only."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = Blocks(), nn.Linear(32, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.blocks(x, attention_mask)
        return self.head(x.float())


NEEDS_AUTOCAST_CALLS = pytest.mark.skipif(
    not _compat.DYNAMO_TRACES_AUTOCAST_CALLS, reason="Dynamo of this PyTorch cannot trace a graph that enters autocast"
)


@pytest.mark.parametrize("where", [pytest.param("inside", marks=NEEDS_AUTOCAST_CALLS), "outside"])
def test_autocast(where: str) -> None:
    """As far from float32 as eager is under autocast, not farther; and really in bfloat16."""
    model = Inside() if where == "inside" else Blocks()
    exact = (Inside if where == "inside" else Blocks)()
    exact.load_state_dict(model.state_dict())
    ours = copy.deepcopy(model)
    with packing() as seen:
        compiled = compile_(ours)
        for lengths in LENGTHS:
            batch = feature_batch(lengths)
            valid = batch["attention_mask"]
            cotangent = torch.randn(*valid.shape, 32 if where == "outside" else 4) * valid.unsqueeze(-1)
            results = []
            for call, own in ((compiled, ours), (model, model), (exact, exact)):
                own.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=where == "outside" and call is not exact):
                    result = without_autocast(call)(**batch) if call is exact else call(**batch)
                result.backward(cotangent.to(result.dtype))
                results.append([result[valid].float(), *(p.grad for p in own.parameters())])
            for found, eager, reference in zip(*results, strict=True):
                scale = reference.abs().max()
                error, usual = (found - reference).abs().max() / scale, (eager - reference).abs().max() / scale
                assert 0 < error <= 2 * usual + 2e-3
    assert steps() == (2, 0) and graphs_compiled() == 1
    assert (seen[0].packed, seen[0].padded) == (8 + (where == "inside"), 0)


def test_autocast_inside_where_dynamo_cannot_trace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the attention alone is rewritten, and the note says why."""
    monkeypatch.setattr(_compat, "DYNAMO_TRACES_AUTOCAST_CALLS", False)
    model = Inside().eval()
    batch = feature_batch(LENGTHS[0])
    with packing(), report.collect() as reports, torch.no_grad():
        found = compile_(copy.deepcopy(model))(**batch)
        valid = batch["attention_mask"]
        torch.testing.assert_close(found[valid], model(**batch)[valid], rtol=3e-2, atol=3e-2)
    assert steps() == (0, 0)
    (seen,) = (one for one in reports if one.sites)
    assert all(site.form in ("zero rows", "exact") for site in seen.rewritten) and seen.rewritten
    assert any("it enters autocast" in note for note in seen.notes)


def without_autocast(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, in which autocast that the model enters itself does nothing."""

    def exactly(**batch: Tensor) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autocast, "__enter__", lambda self: self)
            patch.setattr(torch.autocast, "__exit__", lambda self, *args: None)
            return call(**batch)

    return exactly


def test_training_under_autocast() -> None:
    model, batches = Tagger(), tagged_batches(8)
    ours = copy.deepcopy(model)
    with packing():
        found = losses(compile_(ours), ours, batches, autocast=True)
    expected = losses(model, model, batches, autocast=True)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert steps() == (8, 0)


# --- what is trained -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["first block", "all but the last linear", "biases", "everything"])
def test_frozen_parameters(frozen: str) -> None:
    model = Blocks()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            {
                "first block": not name.startswith("blocks.0"),
                "all but the last linear": name.startswith("blocks.1.down"),
                "biases": not name.endswith("bias"),
                "everything": False,
            }[frozen]
        )
    batches = [feature_batch(lengths) for lengths in LENGTHS]
    if frozen == "everything":  # the gradient of the input alone
        grads = []
        ours = copy.deepcopy(model)
        with packing():
            for call in (compile_(ours), model):
                x = batches[0]["x"].clone().requires_grad_()
                valid = batches[0]["attention_mask"]
                (call(x, valid) * valid.unsqueeze(-1)).square().sum().backward()
                grads.append(x.grad)
        torch.testing.assert_close(*grads, rtol=2e-5, atol=2e-5)
        assert steps() == (1, 0)
    else:
        compare_with_eager(model, batches)


def test_gradient_of_the_input() -> None:
    """Of padded positions it is zero, as in eager: nothing that is observed depends on them."""
    model = Blocks()
    batch = feature_batch(LENGTHS[0])
    valid = batch["attention_mask"]
    found = []
    with packing():
        for call in (compile_(copy.deepcopy(model)), model):
            x = batch["x"].clone().requires_grad_()
            (call(x, valid) * valid.unsqueeze(-1)).square().sum().backward()
            found.append(x.grad)
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)
    assert not found[0][~valid].any()


# --- dropout -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.thorough)])
def test_dropout_is_reproducible(inner: str) -> None:
    model = Tagger(dropout=0.1)
    batches = tagged_batches(4)
    with packing(inner):
        curves = []
        for seed in (1, 1, 2):
            ours = copy.deepcopy(model)
            compiled = compile_(ours)
            torch.manual_seed(seed)
            curves.append(losses(compiled, ours, batches))
    assert curves[0] == curves[1] != curves[2]
    assert steps()[1] == 0


def test_dropout_is_unbiased() -> None:
    """Over many draws the mean output of one attention with dropout is the output without, and so are its gradients."""

    class Attention(nn.Module):
        def forward(self, x: Tensor, value: Tensor, attention_mask: Tensor) -> Tensor:
            query, value = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (x, value))
            y = F.scaled_dot_product_attention(query, query, value, attn_mask=attention_mask[:, None, None, :], dropout_p=0.3)
            return F.dropout(F.linear(y.transpose(1, 2).flatten(2), torch.eye(16)), 0.3)

    draws = 200
    batch = feature_batch([5, 9, 2], 12, 16)
    value = torch.randn_like(batch["x"]).requires_grad_()
    cotangent = torch.randn_like(value) * batch["attention_mask"].unsqueeze(-1)
    total, gradients = torch.zeros(3, 12, 16), torch.zeros(3, 12, 16)
    with packing("aot_eager"):
        compiled = compile_(Attention())
        for _ in range(draws):
            y = compiled(batch["x"], value, batch["attention_mask"])
            total += y.detach()
            gradients += torch.autograd.grad(y, value, cotangent)[0]
    query, eager_value = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (batch["x"], value))
    exact = F.scaled_dot_product_attention(query, query, eager_value, attn_mask=batch["attention_mask"][:, None, None, :])
    exact = exact.transpose(1, 2).flatten(2)
    (gradient,) = torch.autograd.grad(exact, value, cotangent)
    valid = batch["attention_mask"]
    assert steps() == (draws, 0)
    # Each element is dropped with probability 0.3 twice over: its deviation is of its own size.
    assert ((total / draws - exact)[valid].abs().max() < 6 / draws**0.5).item()
    assert ((gradients / draws - gradient)[valid].abs().max() < 6 * gradient.abs().max() / draws**0.5).item()


# --- recomputation around the compiled model -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reentrant", "dropout"), [(True, 0.2), (False, 0.2), (False, 0.0), pytest.param(True, 0.0, marks=pytest.mark.thorough)]
)
def test_checkpoint_around_the_compiled_model(reentrant: bool, dropout: float) -> None:
    model = Blocks(dropout=dropout)
    ours = copy.deepcopy(model)
    with packing():
        compiled = compile_(ours)
        for lengths in LENGTHS:
            batch = feature_batch(lengths)
            valid = batch["attention_mask"]
            cotangent = torch.randn_like(batch["x"]) * valid.unsqueeze(-1)
            gradients = []
            for through in (True, False):
                ours.zero_grad()
                torch.manual_seed(3)
                x = batch["x"].clone().requires_grad_()
                y = checkpoint(compiled, x, valid, use_reentrant=reentrant) if through else compiled(x, valid)
                y.backward(cotangent)
                gradients.append([x.grad, *(p.grad.clone() for p in ours.parameters())])
            torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
            if not dropout:
                model.zero_grad()
                y = model(batch["x"], valid)
                y.backward(cotangent)
                assert_gradients_close(ours, model)
                assert_rows_close(compiled(**batch), y, valid, 2e-5)
    assert steps()[1] == 0 and graphs_compiled() >= 1
