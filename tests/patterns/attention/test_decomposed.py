"""Attention written out is found in every order in which people write it, and what is not attention is not."""

from __future__ import annotations

import math
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.patterns import zoo
from tests.patterns.attention.rebuild import Detected, detect
from tests.patterns.zoo import assert_same

Tensor = torch.Tensor
LOWEST = torch.finfo(torch.float32).min
NO_CAP = "its scores are multiplied behind tanh with what is no number from 0.001 to 4000"


def bert(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
    scores = scores + (1.0 - valid[:, None, None].float()) * -10000.0
    return torch.matmul(F.softmax(scores, dim=-1), v)


def masked_fill(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(valid[:, None, None] == 0, float("-inf"))
    return scores.softmax(-1) @ v


def scaled_query(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.where(valid[:, None, None], torch.matmul(q * 0.25, k.transpose(2, 3)), -1e9)
    return torch.matmul(torch.softmax(scores, -1), v)


def scaled_query_and_key(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.matmul(q / 2, (k * 0.5).permute(0, 1, 3, 2) * 3)
    scores = torch.where(~valid[:, None, None], torch.tensor(LOWEST), scores)
    return torch.matmul(torch.softmax(scores, -1), v)


def scaled_after_the_mask(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT).masked_fill(~valid[:, None, None], -1e4) * 0.2
    return torch.matmul(torch.softmax(scores, -1), v)


def scaled_by_a_literal(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT) / torch.sqrt(torch.tensor(q.size(-1), dtype=q.dtype))
    scores = scores.masked_fill(~valid[:, None, None], LOWEST)
    return torch.matmul(torch.softmax(scores, -1), v)


def scaled_by_a_tensor(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    temperature = q.detach().abs().mean((0, 2, 3), keepdim=True)
    scores = torch.matmul(q, k.mT) / temperature + (~valid[:, None, None]).float() * LOWEST
    return torch.matmul(torch.softmax(scores, -1), v)


def in_place(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores *= 0.5
    scores.masked_fill_(~valid[:, None, None], float("-inf"))
    return torch.matmul(torch.softmax(scores, -1), v)


def two_masks(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT) * 0.5
    later = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, -1e9) + (~valid[:, None, None]).float() * -1e9
    return torch.matmul(torch.softmax(scores, -1), v)


def weights_masked_again(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    hidden = ~valid[:, None, None]
    weights = torch.softmax(torch.matmul(q, k.mT).masked_fill(hidden, LOWEST), -1)
    return torch.matmul(weights.masked_fill(hidden, 0.0), v)


def nan_to_zero(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    weights = torch.softmax(torch.matmul(q, k.mT).masked_fill(~valid[:, None, None], -math.inf), -1)
    return torch.matmul(weights.nan_to_num(0.0), v)


def einsum(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.size(-1) ** -0.5
    scores = scores.masked_fill(~valid[:, None, None], LOWEST)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def bmm_folded(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """As in BART and others of its time: the mask is applied in four dimensions."""
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, s, d) for t in (q * d**-0.5, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(b, h, s, s)
    mask = torch.zeros(b, 1, 1, s).masked_fill(~valid[:, None, None], LOWEST)
    weights = torch.softmax((scores + mask).view(b * h, s, s), -1)
    return torch.bmm(F.dropout(weights, 0.1, training=False), v).view(b, h, s, d)


def baddbmm(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """As in nn.MultiheadAttention: the mask is folded too."""
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    mask = torch.zeros(b, 1, 1, s).masked_fill(~valid[:, None, None], -math.inf).expand(b, h, 1, s).reshape(b * h, 1, s)
    weights = torch.softmax(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=0.5), -1)
    return torch.bmm(weights, v).view(b, h, s, d)


def no_mask(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.mT), -1), v)


def soft_cap(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """As in Gemma 2."""
    scores = torch.tanh(torch.matmul(q, k.mT) * 0.5 / 30.0) * 30.0
    return torch.matmul(torch.softmax(scores + (~valid[:, None, None]).float() * LOWEST, -1), v)


def soft_cap_and_scales(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Of all factors those in front of tanh are inside, with one for each row of queries, and those behind are the cap."""
    scores = torch.matmul(q * -3.0, (k * 0.5).mT) / q.detach().abs().mean((0, 2, 3), keepdim=True)
    scores = (5.0 * scores.tanh()).masked_fill(~valid[:, None, None], -1e8) * 0.25
    return torch.matmul(torch.softmax(scores, -1), v)


def soft_cap_folded(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    scores = torch.baddbmm(torch.empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=0.3).tanh().view(b, h, s, s)
    weights = torch.softmax(scores.masked_fill(~valid[:, None, None], -math.inf).view(b * h, s, s), -1)
    return torch.bmm(weights, v).view(b, h, s, d)


def in_float32(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    mask = torch.zeros(valid.shape, dtype=q.dtype).masked_fill(~valid, torch.finfo(q.dtype).min)[:, None, None]
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.5 + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).float()


WRITTEN_OUT = [
    bert, masked_fill, scaled_query, scaled_query_and_key, scaled_after_the_mask, scaled_by_a_literal, scaled_by_a_tensor,
    in_place, two_masks, weights_masked_again, nan_to_zero, einsum, bmm_folded, baddbmm, no_mask, in_float32,
    soft_cap, soft_cap_and_scales, soft_cap_folded,
]  # fmt: skip


# Those in which a size or a number of the model becomes a symbol that the walk meets.
WITH_SYMBOLS = [bert, scaled_by_a_literal, weights_masked_again, bmm_folded, baddbmm, soft_cap]


@pytest.mark.parametrize(
    ("attention", "dynamic"),
    [*((f, False) for f in WRITTEN_OUT), *((f, True) for f in WITH_SYMBOLS)],
    ids=lambda x: getattr(x, "__name__", {False: "static", True: "dynamic"}.get(x)),
)
def test_fields_say_what_it_computes(attention: Any, dynamic: bool) -> None:
    backend = Detected()
    tolerance = 3e-2 if attention is in_float32 else 1e-4
    assert_same(zoo.ByHand(attention), zoo.hand_inputs(), backend, dynamic=dynamic, tolerance=tolerance)
    assert backend.reasons == []
    assert [c.spelling for c in backend.candidates] == ["decomposed"]


@pytest.mark.parametrize(("name", "dynamic"), [*((name, False) for name in zoo.HF_MODELS), ("bert", True)])
def test_hugging_face(name: str, dynamic: bool) -> None:
    model, inputs = zoo.hf_model(name, "eager")
    backend = Detected()
    assert_same(model.eval(), inputs, backend, dynamic=dynamic)
    assert [c.spelling for c in backend.candidates] == ["decomposed"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["encoder", "multi_head"])
def test_torch_nn(kind: str, training: bool) -> None:
    if kind == "encoder" and training:
        pytest.skip("in training it calls scaled_dot_product_attention")
    model = (zoo.Encoder() if kind == "encoder" else zoo.MultiHead(True)).train(training)
    backend = Detected()
    with torch.set_grad_enabled(training):
        assert_same(model, zoo.nn_inputs(), backend, backward=training)
    assert [c.spelling for c in backend.candidates] == ["decomposed"]
    assert [c.dropout_p for c in backend.candidates] == [0.1 if training else 0.0]


class TestDescriptions(expecttest.TestCase):
    maxDiff = None

    def test_bert(self) -> None:
        self.assertExpectedInline(
            detect(zoo.ByHand(bert), **zoo.hand_inputs()).text,
            """\
decomposed matmul_1 = attention(transpose, transpose_1, transpose_2)
  sizes: b=3, h=4, q=8, k=8, kv_groups=1
  masks: add mul in float32
  scale: 0.5, dropout: 0
  interior: transpose_3, matmul, div, add, softmax, matmul_1""",
        )

    def test_scaled_after_the_mask(self) -> None:
        self.assertExpectedInline(
            detect(zoo.ByHand(scaled_after_the_mask), **zoo.hand_inputs()).text,
            """\
decomposed matmul_1 = attention(transpose, transpose_1, transpose_2)
  sizes: b=3, h=4, q=8, k=8, kv_groups=1
  masks: fill bitwise_not value=-2000.0 in float32
  scale: 0.2, dropout: 0
  interior: m_t, matmul, masked_fill, mul, softmax, matmul_1""",
        )

    def test_two_masks(self) -> None:
        self.assertExpectedInline(
            detect(zoo.ByHand(two_masks), **zoo.hand_inputs()).text,
            """\
decomposed matmul_1 = attention(transpose, transpose_1, transpose_2)
  sizes: b=3, h=4, q=8, k=8, kv_groups=1
  masks: fill triu value=-1000000000.0, add mul_1 in float32
  scale: 0.5, dropout: 0
  interior: m_t, matmul, mul, masked_fill, add, softmax, matmul_1""",
        )

    def test_einsum(self) -> None:
        self.assertExpectedInline(
            detect(zoo.ByHand(einsum), **zoo.hand_inputs()).text,
            """\
decomposed matmul_1 = attention(permute, transpose_int, permute_2)
  sizes: b=3, h=4, q=8, k=8, kv_groups=1
  masks: fill bitwise_not value=-3.4028234663852886e+38 in float32
  scale: 0.5, dropout: 0
  interior: matmul, mul, masked_fill, softmax, matmul_1""",
        )

    def test_bmm_folded(self) -> None:
        self.assertExpectedInline(
            detect(zoo.ByHand(bmm_folded), **zoo.hand_inputs()).text,
            """\
decomposed bmm_1 = attention(reshape, reshape_1, reshape_2)
  sizes: b=3, h=4, q=8, k=8, kv_groups=1, folded
  masks: add masked_fill in float32
  scale: 1, dropout: 0
  interior: transpose_3, bmm, view_3, add, view_4, softmax, bmm_1""",
        )

    def test_multi_head_attention(self) -> None:
        self.assertExpectedInline(
            detect(zoo.MultiHead(True), **zoo.nn_inputs()).text,
            """\
decomposed bmm = attention(transpose_2, transpose_3, transpose_4)
  sizes: b=3, h=4, q=8, k=8, kv_groups=1, folded
  masks: add reshape in float32
  scale: 0.5, dropout: 0.1
  interior: mul, transpose_5, baddbmm, softmax, dropout, bmm""",
        )

    def test_in_float32(self) -> None:
        self.assertExpectedInline(
            detect(zoo.ByHand(in_float32), **zoo.hand_inputs()).text,
            """\
decomposed matmul_1 = attention(to, to_1, to_2)
  sizes: b=3, h=4, q=8, k=8, kv_groups=1
  masks: add unsqueeze_1 in bfloat16
  scale: 0.5, dropout: 0
  interior: transpose_3, matmul, mul, add, softmax, to_3, matmul_1""",
        )

    def test_llama(self) -> None:
        model, inputs = zoo.hf_model("llama", "eager")
        text = detect(model, **inputs).text.replace(", transpose_3", ",\n    transpose_3")
        self.assertExpectedInline(
            text,
            """\
decomposed matmul_1 = attention(add_4, add_5, transpose_2)
  sizes: b=3, h=4, q=8, k=8, kv_groups=2
  masks: add where in float32
  scale: 0.5, dropout: 0
  interior: unsqueeze_13, expand_1, reshape, unsqueeze_14, expand_2, reshape_1,
    transpose_3, matmul, mul_9, add_6, softmax, matmul_1""",
        )


# ---------------------------------------------------------------------------------------------------- left, and why


def mask_before_scale(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = (torch.matmul(q, k.mT) + (~valid[:, None, None]).float() * -1e9) / 2
    return torch.matmul(torch.softmax(scores, -1), v)


def scores_assigned(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores[..., 0] = -1e9
    return torch.matmul(torch.softmax(scores, -1), v)


def capped_after_the_mask(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Which hides nothing: the lowest score is -30."""
    scores = torch.matmul(q, k.mT).masked_fill(~valid[:, None, None], LOWEST)
    return torch.matmul(torch.softmax(torch.tanh(scores / 30) * 30, -1), v)


def capped_with_a_number(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.tanh(torch.matmul(q, k.mT) + 1.0), -1), v)


def capped_with_a_bias(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    mask = torch.zeros(b * h, 1, s)
    return torch.bmm(torch.softmax(torch.baddbmm(mask, q, k.transpose(1, 2)).tanh(), -1), v).view(b, h, s, d)


def capped_twice(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.mT).tanh().tanh(), -1), v)


def negative_cap(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.mT).tanh() * -3, -1), v)


def large_cap(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Scores may be lower than what hides."""
    scores = (torch.matmul(q, k.mT).tanh() * 1e6).masked_fill(~valid[:, None, None], -1e5)
    return torch.matmul(torch.softmax(scores, -1), v)


def tiny_cap(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.mT).tanh() * 1e-50, -1), v)


def divided_by_zero(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.mT).tanh() / 0.0, -1), v)


def infinite_scale(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.mT) * 1e200 * 1e200, -1), v)


def lowered_before_the_mask(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Below what is to hide: the masked keys have all the weight."""
    scores = (torch.matmul(q, k.mT) + -1e10).masked_fill(~valid[:, None, None], -1e9)
    return torch.matmul(torch.softmax(scores, -1), v)


def capped_and_lowered_before_the_mask(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.where(valid[:, None, None], torch.tanh(torch.matmul(q, k.mT)) * 3 + -20000.0, -1e4)
    return torch.matmul(torch.softmax(scores, -1), v)


def cap_for_each_query(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.mT).tanh() * q.detach().abs().mean(-1, keepdim=True), -1), v)


def another_function(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.mT).clamp(-30, 30), -1), v)


def dropped_keys(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    weights = torch.softmax(torch.matmul(q, k.mT).masked_fill(~valid[:, None, None], -1e9), -1)
    return torch.matmul(weights * valid[:, None, None], v)


def masked_by_another(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    weights = torch.softmax(torch.matmul(q, k.mT).masked_fill(~valid[:, None, None], -1e9), -1)
    return torch.matmul(weights.masked_fill(valid.roll(1, 1)[:, None, None], 0.0), v)


def relative_position(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT) + torch.matmul(q, v.mT)
    return torch.matmul(torch.softmax(scores, -1), v)


def cast_down(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT) + (~valid[:, None, None]).float() * LOWEST
    return torch.matmul(torch.softmax(scores.bfloat16(), -1).float(), v)


def two_dtypes(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.matmul(q.bfloat16(), k.bfloat16().mT).masked_fill(~valid[:, None, None], -1e9)
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32), v)


def reshaped_weights(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    weights = torch.softmax(torch.matmul(q, k.mT), -1)
    return torch.matmul(weights.flatten(1, 2), v.transpose(1, 2).flatten(2)).view_as(torch.cat([q] * 4, -1))[..., :4]


def multiplied_mask(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.mT) * valid[:, None, None], -1), v)


def two_values(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    weights = torch.softmax(torch.matmul(q, k.mT), -1)
    return torch.matmul(weights, v) + torch.matmul(weights, k)


def where_tensor(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT)
    other = torch.randn(q.size(0), 1, 1, q.size(2))
    return torch.matmul(torch.softmax(torch.where(valid[:, None, None], scores, other), -1), v)


def shared_key(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k[:1].mT), -1), v)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (mask_before_scale, "its mask is added before the scores are scaled"),
        (scores_assigned, "its scores go through select_scatter before the softmax"),
        (another_function, "its scores go through clamp before the softmax"),
        (capped_after_the_mask, "its scores are masked before tanh, which hides nothing"),
        (capped_with_a_number, "a number is added to its scores before tanh"),
        (capped_with_a_bias, "its scores are masked before tanh, which hides nothing"),
        (capped_twice, "its scores go through tanh twice"),
        (negative_cap, NO_CAP),
        (cap_for_each_query, NO_CAP),
        (large_cap, NO_CAP),
        (tiny_cap, NO_CAP),
        (divided_by_zero, "its scores are divided by zero"),
        (infinite_scale, "its scores are scaled by no finite number"),
        (lowered_before_the_mask, "a number is added to its scores before some are replaced"),
        (capped_and_lowered_before_the_mask, "a number is added to its scores before some are replaced"),
        (dropped_keys, "its weights go through mul before they are multiplied with the values"),
        (masked_by_another, "its weights are masked again after the softmax, by another mask"),
        (relative_position, "its scores are the sum of two matrix products (a position bias computed from the queries)"),
        (cast_down, "its scores are cast to a lower precision after they are masked"),
        (two_dtypes, "its scores are computed in bfloat16 and its result in float32"),
        (reshaped_weights, "its weights go through flatten before they are multiplied with the values"),
        (multiplied_mask, "its scores are multiplied with unsqueeze_1, which is no scale"),
        (two_values, "its weights are multiplied with more than one tensor of values"),
        (where_tensor, "its masked scores are replaced by a tensor of different values"),
        (shared_key, "the key's batch and heads [1, 4] broadcast to the query's [3, 4]"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_is_rejected(attention: Any, reason: str) -> None:
    backend = detect(zoo.ByHand(attention), **zoo.hand_inputs())
    assert backend.reasons == [reason]
    assert not backend.candidates


class ReturnsWeights(zoo.ByHand):
    def __init__(self, used: bool) -> None:
        super().__init__(masked_fill)
        self.used = used

    def forward(self, x: Tensor, valid: Tensor) -> Any:
        q, k, v = (t.unflatten(-1, (zoo.HEADS, -1)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        weights = torch.matmul(q, k.mT).masked_fill(~valid[:, None, None], LOWEST).softmax(-1)
        average = weights.mean(1)
        y = torch.matmul(weights, v)
        return (y, average) if self.used else y


def test_weights_that_are_returned() -> None:
    backend = detect(ReturnsWeights(True), **zoo.hand_inputs())
    assert backend.reasons == ["its weights are also used by mean: they are returned, or kept (output_attentions)"]
    assert not backend.candidates


def test_weights_that_nobody_uses() -> None:
    backend = Detected()
    assert_same(ReturnsWeights(False), zoo.hand_inputs(), backend)
    assert len(backend.candidates) == 1


def test_multi_head_attention_that_returns_weights() -> None:
    backend = detect(zoo.MultiHead(True, returned=True), **zoo.nn_inputs())
    (reason,) = backend.reasons
    assert reason.startswith("its weights are also used by view_")


FILL = -1e9


def test_numbers_that_change() -> None:
    """Under dynamic=True a number outside the graph is a symbol: a fill is fixed by a guard, a scale goes to the query."""

    class Model(zoo.ByHand):
        scale = 0.5

        def forward(self, x: Tensor, valid: Tensor) -> Tensor:
            batch, length, width = x.shape
            q, k, v = (t.view(batch, length, zoo.HEADS, -1).transpose(1, 2) for t in self.project(x).chunk(3, -1))
            scores = (q @ k.mT * self.scale).masked_fill(~valid[:, None, None], FILL)
            return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)

    global FILL
    model, inputs, backend = Model(bert), zoo.hand_inputs(), Detected()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for FILL, model.scale in ((-1e9, 0.5), (-1e9, 0.25), (-1e8, 0.25)):  # noqa: B007
        torch.testing.assert_close(compiled(**inputs), model(**inputs))
    assert [op.value for c in backend.candidates for op in c.mask_ops] == [-1e9, -1e8]
    assert [c.scale for c in backend.candidates] == [1.0, 1.0]


def test_scores_written_under_autograd_blindness() -> None:
    """A write that cannot be made functional, and that the chain of operators does not show."""

    def function(x: Tensor) -> Tensor:
        scores = x @ x.mT
        with torch.no_grad():
            scores[:, :, :, 0] = -1e9
        return scores.softmax(-1) @ x

    backend = detect(function, x=torch.randn(2, 2, 4, 8, requires_grad=True))
    assert backend.reasons == ["matmul is written in place"]


# ------------------------------------------------------------------------------------------------- other softmaxes


class Classifier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.score(x).squeeze(-1).unsqueeze(1).softmax(-1)) @ x


class Routing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1).topk(2).values


class OverQueries(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(1) @ x


@pytest.mark.parametrize("model", [Classifier, Pooling, Routing, OverQueries])
def test_other_softmaxes_are_not_mentioned(model: type[nn.Module]) -> None:
    backend = detect(model(), x=torch.randn(2, 4, 8))
    assert not backend.candidates
    assert not backend.rejected
