"""The packed graph: what crosses the edges of a region, where, and in which form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from analysed import B, E, H, S, attend, batch
from torch import Tensor, fx, nn

from varlen_inductor import config, driver

X, VALID = batch()
aten = torch.ops.aten
ours = torch.ops.varlen_inductor


def built(function: Callable[..., Any], *args: Tensor, mode: str = "model", dynamic: bool | None = None) -> fx.Graph:
    """The graph that a function becomes."""
    torch._dynamo.reset()
    made: list[driver.Rewrite] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        made.append(driver.rewrite_graph(gm, mode=mode))
        return gm

    with config.patch(round_tokens=4, max_density=1.0):
        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    assert made[0].gm is not None, made[0].report.table()
    graph = made[0].gm.graph
    graph.lint()
    return graph


def calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is target]


def order(graph: fx.Graph, *nodes: fx.Node) -> bool:
    """Whether the nodes come in this order."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    return [place[n] for n in nodes] == sorted(place[n] for n in nodes)


W = torch.randn(E, E)


def test_one_pack_and_one_unpack_for_a_stack_of_layers() -> None:
    def function(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            x = F.layer_norm(attend(F.linear(x, w), v) + x, (E,))
        return x

    graph = built(function, X, VALID, W)
    assert len(calls(graph, ours.pack.default)) == 1
    (unpack,) = calls(graph, ours.unpack.default)
    assert unpack.args[3:] == (0.0, False)  # an output: zeros
    assert len(calls(graph, ours.varlen_attn.default)) == 3


def test_how_padded_rows_are_filled() -> None:
    """With what they are known to hold; with copies of a valid row where nobody can see them; with zeros in outputs."""

    def function(x: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = F.linear(attend(x, v), w)
        known = (y * v[..., None] + 2).sum(1)
        unseen = (torch.var_mean(y, -1)[0] * v).sum(1)  # an operator without a packed twin
        return known, y, unseen

    fills = {n.args[3:] for n in calls(built(function, X, VALID, W), ours.unpack.default)}
    assert {(2.0, False), (0.0, False), (0.0, True)} <= fills


def test_packed_where_it_is_made() -> None:
    """Not where it is first used, which may be under another grad mode."""

    def function(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        y = x.cumsum(1)
        z = y + y.mean(1, keepdim=True)
        with torch.no_grad():
            gate = F.linear(z, w).sigmoid()
        return attend(F.linear(z, w) * gate, v)

    graph = built(function, X.clone().requires_grad_(), VALID, W)
    packs = calls(graph, ours.pack.default)
    modes = calls(graph, torch._C._set_grad_enabled)
    assert len(packs) == 1
    assert order(graph, packs[0], modes[0])


@pytest.mark.parametrize("mode", ["model", "attention"])
def test_nothing_with_a_gradient_is_packed_without_grad(mode: str) -> None:
    """The plan is made under no_grad: what it is for is packed behind that block."""

    def function(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        q = F.linear(x, w).view(B, S, H, -1).transpose(1, 2)
        with torch.no_grad():
            mask = v.long().sort(1, descending=True)[0] > 0
        y = F.scaled_dot_product_attention(q, q * 2, q * 3, attn_mask=mask[:, None, None])
        return F.linear(y.transpose(1, 2).reshape(x.shape), w)

    graph = built(function, X.clone().requires_grad_(), VALID, W, mode=mode)
    modes = calls(graph, torch._C._set_grad_enabled)
    if mode == "attention":
        (plan,) = calls(graph, ours.plan_static.default)
        assert order(graph, modes[0], plan, modes[1])
    for pack in calls(graph, ours.pack.default):
        assert not order(graph, modes[0], pack, modes[1])


def test_a_written_value_is_packed_when_it_is_read() -> None:
    """Each time anew: between two reads of a view its memory may have been written."""

    def function(x: Tensor, v: Tensor, out: Tensor, w: Tensor) -> Tensor:
        view = out.view(B, S, E)
        y = attend(F.linear(x, w) + view, v)
        out.mul_(2)
        return F.linear(y + view, w)

    graph = built(function, X, VALID, torch.randn(B * S, E), W)
    (write,) = calls(graph, aten.mul_.Tensor)

    def reads_view(pack: fx.Node) -> bool:
        node = pack.args[0]
        while isinstance(node, fx.Node) and node.op != "placeholder":
            node = node.args[0]
        return node in write.all_input_nodes

    packs = [p for p in calls(graph, ours.pack.default) if reads_view(p)]
    assert [order(graph, p, write) for p in packs] == [True, False]


def test_what_varies_with_position_or_batch_alone_is_gathered_once() -> None:
    def function(x: Tensor, v: Tensor, table: Tensor, vector: Tensor, w: Tensor) -> Tensor:
        vector = vector[:, None]
        y = attend(F.linear(x + table, w) * vector, v)
        return F.linear(y + table, w) * vector

    graph = built(function, X, VALID, torch.randn(S, E), torch.randn(B, E), W)
    gathered = calls(graph, aten.index_select.default)
    assert len(gathered) == 2
    assert len(calls(graph, aten.remainder.Scalar)) == len(calls(graph, aten.div.Tensor_mode)) == 1


def test_operands_that_have_no_packed_form() -> None:
    """A value per batch row and head, folded into one dimension, beside packed heads: computed on padded rows."""

    def function(x: Tensor, v: Tensor, gate: Tensor, w: Tensor) -> Tensor:
        q = F.linear(x, w).view(B, S, H, -1).transpose(1, 2).reshape(B * H, S, -1)
        q = q + gate.view(B, H, 1, 1).expand(-1, -1, 1, E // H).reshape(B * H, 1, -1)
        mask = v[:, None, None].expand(-1, H, 1, -1).reshape(B * H, 1, S)
        y = F.scaled_dot_product_attention(q, q * 2, q * 3, attn_mask=mask)
        return F.linear(y.view(B, H, S, -1).transpose(1, 2).reshape(x.shape), w)

    x, gate = torch.randn(B, S, E), torch.randn(B, H)
    graph = built(function, x, VALID, gate, W)
    assert any(n.target is aten.add.Tensor and "val" in n.meta for n in graph.nodes)


def test_labels_of_dead_rows_are_ignored() -> None:
    labels = torch.zeros(B, S, dtype=torch.long)

    def function(x: Tensor, v: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(attend(x, v), w).view(-1, E), t.view(-1), ignore_index=7)

    graph = built(function, X, VALID, labels, W)
    (loss,) = calls(graph, aten.cross_entropy_loss.default)
    labels_of_rows = loss.args[1]
    assert isinstance(labels_of_rows, fx.Node)
    assert labels_of_rows.target is aten.where.ScalarOther
    assert labels_of_rows.args[2] == 7
    assert not calls(graph, ours.unpack.default)


def test_views_of_one_output() -> None:
    """They are made again from what is returned."""

    def function(x: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(attend(x, v), w)
        return y, y.view(B, S, H, -1).transpose(1, 2)

    graph = built(function, X, VALID, W)
    assert len(calls(graph, ours.unpack.default)) == 1
    base, view = graph.output_node().args[0]  # type: ignore[misc]
    while view.target in (aten.reshape.default, aten.view.default, aten.transpose.int):
        view = view.args[0]
    assert view is base


@pytest.mark.parametrize("shape", [(1, 6, 8), (6, 6, 8), (3, 2, 8), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mode", ["model", "attention"])
def test_sizes_that_coincide(shape: tuple[int, int, int], dynamic: bool | None, mode: str) -> None:
    """Sizes come from the inputs, before all that needs them; nothing is mistaken for something else of the same size."""
    if dynamic and shape[0] == shape[1]:
        pytest.skip("a size that PyTorch itself writes as s**2 // s")
    x, valid = batch(*shape)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(E, E)

        def forward(self, x: Tensor, v: Tensor) -> Tensor:
            b, s, e = x.shape
            y = self.linear(attend(self.linear(x), v).reshape(b * s, e))
            y = y.view(b, s, 2, e // 2).transpose(1, 2).flatten(0, 1).view(b, 2, s, -1).transpose(1, 2)
            return y.reshape(b, s, e)

    graph = built(Model(), x, valid, mode=mode, dynamic=dynamic)
    assert len(calls(graph, ours.unpack.default)) == 1
    expected = {"model": 1, "attention": 3}[mode]
    assert len(calls(graph, ours.pack.default)) == expected


def test_assertions_are_kept() -> None:
    def function(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        torch._assert_async(v.any(), "no token")
        return F.linear(attend(x, v), w)

    graph = built(function, X, VALID, W)
    assert calls(graph, aten._assert_async.msg)
