"""Repeated key and value heads are read before they are repeated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.patterns.attention.rebuild import Detected, detect
from tests.patterns.zoo import assert_same

Tensor = torch.Tensor
HEADS, GROUPS = 6, 3


def hugging_face(x: Tensor) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, GROUPS, s, d).reshape(b, h * GROUPS, s, d)


def contiguous_between(x: Tensor) -> Tensor:
    b, h, s, d = x.shape
    return x.unsqueeze(2).expand(-1, -1, GROUPS, -1, -1).contiguous().view(b, h * GROUPS, s, d)


def repeat_interleave(x: Tensor) -> Tensor:
    return x.repeat_interleave(GROUPS, dim=1)


def repeat_interleave_from_the_end(x: Tensor) -> Tensor:
    return torch.repeat_interleave(x, GROUPS, -3)


def tile(x: Tensor) -> Tensor:
    """Another order of heads: no grouped attention."""
    return x.repeat(1, GROUPS, 1, 1)


def repeat_beside(x: Tensor) -> Tensor:
    b, h, s, d = x.shape
    return x[:, None].expand(b, GROUPS, h, s, d).reshape(b, h * GROUPS, s, d)


class Model(torch.nn.Module):
    def __init__(self, repeat_key: Callable[[Tensor], Tensor], repeat_value: Callable[[Tensor], Tensor], sdpa: bool) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.repeat_key, self.repeat_value, self.sdpa = repeat_key, repeat_value, sdpa

    def forward(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        key, value = self.repeat_key(self.linear(k)), self.repeat_value(self.linear(v))
        if self.sdpa:
            return F.scaled_dot_product_attention(q, key, value, attn_mask=valid[:, None, None])
        return torch.matmul((q @ key.mT * 0.3).masked_fill(~valid[:, None, None], -1e9).softmax(-1), value)


def inputs(heads: int = HEADS // GROUPS) -> dict[str, Tensor]:
    valid = torch.arange(5) < torch.tensor([5, 3])[:, None]
    q, k, v = (torch.randn(2, h, 5, 8) for h in (HEADS, heads, heads))
    return {"q": q, "k": k, "v": v, "valid": valid}


@pytest.mark.parametrize(("sdpa", "dynamic"), [(True, False), (False, True)], ids=["sdpa-static", "decomposed-dynamic"])
@pytest.mark.parametrize(
    "repeat", [hugging_face, contiguous_between, repeat_interleave, repeat_interleave_from_the_end], ids=lambda f: f.__name__
)
def test_repeated_heads(repeat: Callable[[Tensor], Tensor], sdpa: bool, dynamic: bool) -> None:
    backend = Detected()
    data = inputs()
    if dynamic:
        for value in data.values():
            torch._dynamo.mark_dynamic(value, 0)
    model = Model(repeat, repeat, sdpa)
    assert_same(model, data, backend)
    (candidate,) = backend.candidates
    assert candidate.kv_groups == GROUPS
    assert candidate.key.name == "linear"
    assert candidate.value.name == "linear_1"


@pytest.mark.parametrize("sdpa", [True, False], ids=["sdpa", "decomposed"])
def test_one_head_expanded_to_all(sdpa: bool) -> None:
    def expand(x: Tensor) -> Tensor:
        return x.expand(-1, HEADS, -1, -1)

    backend = Detected()
    assert_same(Model(expand, expand, sdpa), inputs(heads=1), backend)
    (candidate,) = backend.candidates
    assert candidate.kv_groups == HEADS
    assert candidate.key.name == "linear"


@pytest.mark.parametrize(
    ("key", "value", "heads"),
    [(tile, tile, 2), (repeat_beside, repeat_beside, 2), (hugging_face, tile, 2)],
    ids=["tile", "repeat_beside", "differently"],
)
def test_other_repetitions_stay(key: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor], heads: int) -> None:
    backend = Detected()
    assert_same(Model(key, value, True), inputs(heads), backend)
    (candidate,) = backend.candidates
    assert candidate.kv_groups == 1


def test_enable_gqa() -> None:
    class Grouped(Model):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
            k, v = self.linear(k), self.linear(v)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None], enable_gqa=True)

    backend = Detected()
    assert_same(Grouped(tile, tile, True), inputs(), backend)
    (candidate,) = backend.candidates
    assert candidate.kv_groups == GROUPS


def test_repeated_key_that_is_used_elsewhere() -> None:
    """The repetition stays for its other user, and is no part of the interior."""

    def function(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        key = repeat_interleave(k)
        return F.scaled_dot_product_attention(q, key, repeat_interleave(v), attn_mask=valid[:, None, None]), key

    (candidate,) = detect(function, **inputs()).candidates
    assert [n.name for n in candidate.interior] == ["repeat_interleave_1", "scaled_dot_product_attention"]
