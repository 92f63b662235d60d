"""Attention by scaled_dot_product_attention is found with all it says."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F

from tests.patterns import zoo
from tests.patterns.attention.rebuild import Detected, detect
from tests.patterns.zoo import assert_same

Tensor = torch.Tensor


def boolean(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])


def additive(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    mask = (1.0 - valid[:, None, None].to(q.dtype)) * torch.finfo(q.dtype).min
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)


def causal(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5], is_causal=True)


def folded(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    q, k, v = (t.reshape(batch * heads, length, dim) for t in (q, k, v))
    mask = valid[:, None].expand(batch, heads, length).reshape(batch * heads, 1, length)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(batch, heads, length, dim)


def value_of_another_width(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(q, k, torch.cat([v, v[..., :2]], -1), attn_mask=valid[:, None, None])
    return y[..., 2:]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("attention", [boolean, additive, causal, folded, value_of_another_width], ids=lambda f: f.__name__)
def test_fields_say_what_it_computes(attention: Any, dynamic: bool) -> None:
    backend = Detected()
    assert_same(zoo.ByHand(attention), zoo.hand_inputs(), backend, dynamic=dynamic)
    assert len(backend.candidates) == 1
    assert not backend.rejected


@pytest.mark.parametrize("name", zoo.HF_MODELS)
def test_hugging_face(name: str) -> None:
    model, inputs = zoo.hf_model(name, "sdpa")
    backend = Detected()
    assert_same(model.eval(), inputs, backend)
    assert [c.spelling for c in backend.candidates] == ["sdpa"]


@pytest.mark.parametrize("make", [zoo.Encoder, lambda: zoo.MultiHead(False)], ids=["encoder", "multi_head"])
def test_torch_nn(make: Any) -> None:
    model = make()
    for module in model.modules():
        # In training, since inference takes the fused path; without dropout, since the kernel draws other numbers.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    backend = Detected()
    assert_same(model, zoo.nn_inputs(), backend)
    assert [c.spelling for c in backend.candidates] == ["sdpa"]


class TestDescriptions(expecttest.TestCase):
    maxDiff = None

    def test_bert_in_training(self) -> None:
        model, inputs = zoo.hf_model("bert", "sdpa")
        self.assertExpectedInline(
            detect(model, **inputs).text,
            """\
sdpa scaled_dot_product_attention = attention(transpose, transpose_1, transpose_2)
  sizes: b=3, h=4, q=8, k=8, kv_groups=1
  masks: bool and_2 in float32
  scale: 0.5, dropout: 0.1
  interior: scaled_dot_product_attention""",
        )

    def test_grouped_heads_and_cause(self) -> None:
        model, inputs = zoo.hf_model("llama", "sdpa")
        self.assertExpectedInline(
            detect(model, **inputs).text,
            """\
sdpa scaled_dot_product_attention = attention(add_4, add_5, transpose_2)
  sizes: b=3, h=4, q=8, k=8, kv_groups=2
  masks: bool and_2 in float32
  scale: 0.5, dropout: 0
  interior: unsqueeze_13, expand_1, reshape, unsqueeze_14, expand_2, reshape_1, scaled_dot_product_attention""",
        )

    def test_causal(self) -> None:
        self.assertExpectedInline(
            detect(zoo.ByHand(causal), **zoo.hand_inputs()).text,
            """\
sdpa scaled_dot_product_attention = attention(transpose, slice_1, slice_2)
  sizes: b=3, h=4, q=8, k=5, kv_groups=1
  masks: none, causal in float32
  scale: 1/sqrt(d), dropout: 0
  interior: scaled_dot_product_attention""",
        )

    def test_folded(self) -> None:
        self.assertExpectedInline(
            detect(zoo.ByHand(folded), **zoo.hand_inputs()).text,
            """\
sdpa scaled_dot_product_attention = attention(reshape, reshape_1, reshape_2)
  sizes: b=3, h=4, q=8, k=8, kv_groups=1, folded
  masks: bool reshape_3 in float32
  scale: 1/sqrt(d), dropout: 0
  interior: scaled_dot_product_attention""",
        )

    def test_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            text = detect(zoo.ByHand(additive), **zoo.hand_inputs()).text
        self.assertExpectedInline(
            text,
            """\
sdpa scaled_dot_product_attention = attention(transpose, transpose_1, transpose_2)
  sizes: b=3, h=4, q=8, k=8, kv_groups=1
  masks: add mul in bfloat16
  scale: 0.3, dropout: 0
  interior: scaled_dot_product_attention""",
        )


def test_five_dimensions() -> None:
    def function(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    reasons = detect(function, x=torch.randn(2, 2, 2, 4, 8)).reasons
    assert reasons == ["its query has 5 dimensions; (batch, heads, length, head_dim) is expected"]


def test_a_key_shared_by_the_batch() -> None:
    def function(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k)

    reasons = detect(function, q=torch.randn(3, 2, 4, 8), k=torch.randn(1, 2, 4, 8)).reasons
    assert reasons == ["the key's batch and heads [1, 2] broadcast to the query's [3, 2]"]


def test_unused_attention_is_not_reported() -> None:
    def function(q: Tensor) -> Tensor:
        F.scaled_dot_product_attention(q, q, q)
        return q * 2

    backend = detect(function, q=torch.randn(3, 2, 4, 8))
    assert not backend.candidates
    assert not backend.rejected
