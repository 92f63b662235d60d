"""Which domains a graph has, which values are of one stream of tokens, and what is packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from analysed import Analysed, B, E, H, S, analysed, attend, batch
from torch import Tensor, nn

from varlen_inductor.patterns.oprules import op_name
from varlen_inductor.patterns.site import attention_of

X, VALID = batch()


def cross(x: Tensor, memory: Tensor, valid: Tensor) -> Tensor:
    """Attention of x (B, S, E) to memory (B, S_k, E)."""
    q, k = (t.view(*t.shape[:2], H, -1).transpose(1, 2) for t in (x, memory))
    return F.scaled_dot_product_attention(q, k, k * 2, attn_mask=valid[:, None, None]).transpose(1, 2).reshape(x.shape)


def names(found: Analysed, index: int = 0) -> list[str]:
    assert found.choice is not None
    return sorted(op_name(n) for n in found.choice.regions[index].nodes)


# --- domains ---------------------------------------------------------------------------------------------------------


def test_one_domain_for_all_layers() -> None:
    """The same condition, however it is spelled."""

    def function(x: Tensor, v: Tensor) -> Tensor:
        y = attend(x, v)
        y = attend(y, v & v)
        q = y.view(B, S, H, -1).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(B, 1, 1, S).masked_fill(~v[:, None, None], -torch.inf))
        return z.transpose(1, 2).reshape(x.shape)

    found = analysed(function, X, VALID)
    assert len(found.region.domain.sites) == 3
    assert not found.region.domain.shared


def test_two_masks_of_the_same_tokens_are_shared() -> None:
    found = analysed(lambda x, v, w: attend(attend(x, v), w), X, VALID, VALID.clone())
    assert found.choice is not None
    assert [r.domain.shared for r in found.choice.regions] == [True, True]


def test_two_streams() -> None:
    """Encoder and decoder: a domain each, also with equal lengths and a shared table of positions."""

    def function(x: Tensor, memory: Tensor, v: Tensor, w: Tensor, table: Tensor) -> Tensor:
        memory = attend(memory + table, v)
        return cross(attend(x + table, w), memory, v)

    found = analysed(function, X, X.clone(), VALID, VALID.clone(), nn.Parameter(torch.randn(S, E)))
    assert found.choice is not None
    assert [r.domain.shared for r in found.choice.regions] == [False, False]
    assert all(attention_of(n) is None or found.choice.domains[n] is r.domain or n is found.node("attention_site", 2)
               for r in found.choice.regions for n in r.nodes)  # fmt: skip
    second = found.choice.domains[found.node("attention_site", 1)]
    assert found.node("attention_site", 2) in found.choice.region(second).nodes


@pytest.mark.parametrize("b", [1, B])
def test_queries_of_another_stream_are_not_packed(b: int) -> None:
    x, valid = batch(b)

    def function(x: Tensor, memory: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return cross(x + table, (memory + table) * 2, v) * 3

    table = torch.nn.Parameter(torch.randn(S, E))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def forward(self, x: Tensor, memory: Tensor, v: Tensor) -> Tensor:
            return function(x, memory, v, self.table)

    found = analysed(Model(), x, x.clone(), valid)
    assert not any(attention_of(n) for n in found.region.nodes)
    assert found.outputs[0] not in found.region.nodes
    assert found.node("mul") in found.region.nodes  # the keys


def test_positions_go_with_their_only_stream() -> None:
    """What is no data but read by one stream alone is packed with it."""

    def function(x: Tensor, v: Tensor, table: Tensor) -> Tensor:
        position = torch.arange(S)[None].expand(B, -1)
        return attend(x + F.embedding(position, table), v)

    found = analysed(function, X, VALID, torch.randn(S, E))
    assert "embedding" in found.packed()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, v: attend(x[:, :1] * 1, v[:, :1]), "one token long"),
        (lambda x, v: attend((x + x.transpose(0, 1)) * 1, v), "cannot be told apart"),
    ],
)
def test_refused(function: Any, reason: str) -> None:
    x, valid = batch(S, S)
    found = analysed(function, x, valid)
    assert found.choice is not None
    assert any(reason in why for why in found.choice.refused.values())


def test_masks_that_hide_queries() -> None:
    def masked(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        q = x.view(B, S, H, -1).transpose(1, 2)
        visible = w[:, None, :, None] & v[:, None, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=visible).transpose(1, 2).reshape(x.shape)

    same = analysed(lambda x, v: masked(x, v, v), X, VALID)
    assert same.choice is not None
    assert not same.choice.refused
    for found in (analysed(lambda x, v: masked(x, v, v).mean(1), X, VALID), analysed(masked, X, VALID, VALID.clone())):
        assert found.choice is not None
        assert "hides queries" in next(iter(found.choice.refused.values()))


# --- what is packed --------------------------------------------------------------------------------------------------


def test_row_wise_operators_are_packed() -> None:
    weight = torch.randn(E, E)

    def function(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        y = attend(F.layer_norm(x, (E,)), v)
        one, two = F.gelu(F.linear(y, w)).chunk(2, -1)
        return torch.cat([two, one], -1) + x

    found = analysed(function, X, VALID, weight)
    assert {"layer_norm", "linear", "gelu", "chunk", "getitem", "cat", "add", "attention_site"} <= found.packed()
    only = analysed(function, X, VALID, weight, mode="attention")
    assert only.packed() == {"attention_site"}


def test_what_leaks_is_not_packed() -> None:
    found = analysed(lambda x, v: (attend(x * 2, v) + 1).mean(1), X, VALID)
    assert "add" not in found.packed()
    assert "attention_site" not in found.packed()


def test_reads_are_packed_only_where_they_can_be_checked() -> None:
    read = lambda x, v: (attend(x, v) + 1)[:, 0]  # noqa: E731
    assert "add" in analysed(read, X, VALID).packed()
    assert not analysed(read, X, VALID, mode="attention").packed()


def test_several_results_together_or_not_at_all() -> None:
    """One half of a chunk is needed in full: none of it is packed."""

    def function(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        one, two = attend(x, v).chunk(2, -1)
        return one * v[..., None], two.mean(1)

    found = analysed(function, X, VALID)
    assert not {"chunk", "getitem"} & found.packed()


@pytest.mark.parametrize(
    "name",
    [
        "softmax over positions",
        "unbind of positions",
        "transposed linear",
        "outer product",
        "sum over the batch",
        "split of positions",
    ],
)
def test_what_mixes_tokens_is_not_packed(name: str) -> None:
    mixers = {
        "softmax over positions": lambda x: x.softmax(1),
        "unbind of positions": lambda x: torch.stack(x.unbind(1)[::-1], 1),
        "transposed linear": lambda x: F.linear(x.transpose(1, 2), torch.ones(S, S)).transpose(1, 2),
        "outer product": lambda x: (x @ x.transpose(1, 2)) @ x,
        "sum over the batch": lambda x: x + x.sum(0),
        "split of positions": lambda x: torch.cat(x.split([2, S - 2], 1)[::-1], 1),
    }
    found = analysed(lambda x, v: attend(mixers[name](x), v), X, VALID)
    ops = {"softmax", "unbind", "stack", "linear", "matmul", "sum", "split", "split_with_sizes", "cat"}
    assert not ops & found.packed()


@pytest.mark.parametrize("shape", [(1, 6, 8), (6, 6, 8), (3, 2, 8), (8, 8, 8)], ids=str)
def test_sizes_that_coincide(shape: tuple[int, int, int]) -> None:
    x, valid = batch(*shape)
    found = analysed(lambda x, v: attend(x, v).softmax(-1) + x.softmax(1).sum(1, keepdim=True), x, valid)
    packed = [n for n in found.region.nodes if op_name(n) == "softmax"]
    assert packed == [found.node("softmax", 0)]


def test_written_values_stay_outside() -> None:
    def function(x: Tensor, v: Tensor, out: Tensor) -> Tensor:
        y = attend(x, v) * 2
        out.copy_(y)
        return out * 3

    found = analysed(function, X, VALID, torch.zeros_like(X))
    assert all(op_name(n) != "copy_" for n in found.region.nodes)
    assert found.outputs[0] not in found.region.nodes
