"""How operators carry dimensions, which they mix, and what has no rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from analysed import B, E, H, S, analysed
from torch import Tensor

from varlen_inductor.patterns.demand import dims_of

W = torch.randn(5, E)

KEPT: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "pointwise": (lambda x: torch.where(x > 0, x * 2 + 1, x.exp()).clamp(0, 1), "b s e"),
    "linear": (lambda x: F.linear(x, W), "b s ?"),
    "matmul": (lambda x: x @ torch.ones(E, 5), "b s ?"),
    "einsum": (lambda x: torch.einsum("bse,fe->sbf", x, W), "s b ?"),
    "layer norm": (lambda x: F.layer_norm(x, (E,)), "b s e"),
    "rms norm": (lambda x: F.rms_norm(x, (E,)), "b s e"),
    "softmax": (lambda x: x.softmax(-1), "b s e"),
    "transpose": (lambda x: x.transpose(1, 2), "b e s"),
    "permute": (lambda x: x.permute(2, 0, 1), "e b s"),
    "movedim": (lambda x: x.movedim(0, -1), "s e b"),
    "flatten": (lambda x: x.flatten(0, 1), "(b s) e"),
    "heads": (lambda x: x.view(B, S, H, E // H).transpose(1, 2), "b e0 s e1"),
    "folded heads": (lambda x: x.view(B, S, H, -1).transpose(1, 2).reshape(B * H, S, -1), "(b e0) s e1"),
    "unsqueeze": (lambda x: x.unsqueeze(1), "b 1 s e"),
    "squeeze": (lambda x: x.unsqueeze(2).squeeze(2), "b s e"),
    "expand": (lambda x: x[:, :, None].expand(-1, -1, 3, -1) * 1, "b s ? e"),
    "repeat": (lambda x: x.repeat(1, 1, 2), "b s ?"),
    "slice of features": (lambda x: x[..., 1:] * 1, "b s ?"),
    "whole slice": (lambda x: x[:, 0:S] * 1, "b s e"),
    "slice of positions": (lambda x: x[:, 1:] * 1, "b ? e"),
    "select": (lambda x: x[:, 0] * 1, "b e"),
    "chunk": (lambda x: x.chunk(2, -1)[1] * 1, "b s ?"),
    "unbind": (lambda x: x.unbind(2)[0] * 1, "b s"),
    "stack": (lambda x: torch.stack([x, x * 2], 1), "b ? s e"),
    "cat": (lambda x: torch.cat([x, x], -1), "b s ?"),
    "sum": (lambda x: x.sum(-1, keepdim=True), "b s 1"),
    "mean": (lambda x: x.mean((1, 2)), "b"),
    "max": (lambda x: x.max(1)[0] * 1, "b e"),
    "argmax": (lambda x: x.argmax(-1), "b s"),
    "sort": (lambda x: x.sort(-1)[0] * 1, "b s e"),
    "topk": (lambda x: x.topk(3, -1)[0] * 1, "b s ?"),
    "cumsum": (lambda x: x.cumsum(1), "b s e"),
    "gather": (lambda x: x.gather(2, x.argsort(-1)), "b s e"),
    "embedding": (lambda x: F.embedding(x.long().clamp(0, 4).sum(-1).clamp(0, 4), W), "b s ?"),
    "conv over positions": (lambda x: F.conv1d(x.transpose(1, 2), torch.ones(5, E, 3), padding=1), "b ? ?"),
    "conv of one": (lambda x: F.conv1d(x.transpose(1, 2), torch.ones(5, E, 1)), "b ? s"),
    "table": (lambda x: W[x.long().sum(-1).clamp(0, 4)], "b s ?"),
    "second dimension of a table": (lambda x: W[:, x.long().sum(-1).clamp(0, 3)], "? b s"),
    "indexed features": (lambda x: x[..., torch.tensor([[0, 1], [2, 3]])], "b s ? ?"),
    "indexed positions": (lambda x: x[:, torch.tensor([0, 1, 1])], "b ? e"),
    "two indices": (lambda x: x[torch.arange(B), torch.tensor([0, 1, 1])], "? ?"),
    "gate": (lambda x: F.glu(x), "b s ?"),
    "gate of positions": (lambda x: F.glu(x, 1), "b ? e"),
    "loss of elements": (lambda x: F.mse_loss(x, x * 2, reduction="none"), "b s e"),
    "loss of labels": (
        lambda x: F.cross_entropy(x.flatten(0, 1), x.long().sum(-1).clamp(0, 3).flatten(), reduction="none"), "(b s)",
    ),
    "loss of labels, classes second": (
        lambda x: F.cross_entropy(x.transpose(1, 2), x.long().sum(-1).clamp(0, 3), reduction="none"), "b s",
    ),
    "pad of features": (lambda x: F.pad(x, (0, 2)), "b s ?"),
    "pad of nothing": (lambda x: F.pad(x, (0, 0, 0, 0)) * 1, "b s e"),
    "select scatter": (lambda x: x.select_scatter(x[:, 0] * 2, 1, 3), "b s e"),
    "slice scatter": (lambda x: x.slice_scatter(x[..., :2] * 2, 2, 1, 3), "b s e"),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.view(B, S, E // 2, 2)) * 2).flatten(2), "b s (e0 ?)"),
    "unknown": (lambda x: torch.fft.fft(x, dim=-1).real, "? ? ?"),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_dimensions(name: str, dynamic: bool | None) -> None:
    function, expected = KEPT[name]
    if dynamic and name in ("whole slice", "heads", "folded heads", "complex"):
        pytest.skip("written with numbers")
    found = analysed(function, torch.randn(B, S, E), dynamic=dynamic)
    assert found.letters(found.outputs[0]) == expected


MIXED: dict[str, tuple[Callable[[Tensor], Any], str, set[int]]] = {
    "linear": (lambda x: F.linear(x, W), "linear", {2}),
    "padded convolution of width one": (lambda x: F.conv1d(x, torch.ones(2, S, 1), padding=1), "conv1d", {1, 2}),
    "softmax": (lambda x: x.softmax(1), "softmax", {1}),
    "cumsum": (lambda x: x.cumsum(-2), "cumsum", {1}),
    "mean": (lambda x: x.mean((0, -1)), "mean", {0, 2}),
    "amax of all": (lambda x: x.amax(), "amax", {0, 1, 2}),
    "layer norm": (lambda x: F.layer_norm(x, (S, E)), "layer_norm", {1, 2}),
    "slice": (lambda x: x[:, 1:] * 1, "slice", {1}),
    "whole slice": (lambda x: x[:, :100] * 1, "mul", set()),
    "flip": (lambda x: x.flip(0, 1), "flip", {0, 1}),
    "roll": (lambda x: x.roll(1, 1), "roll", {1}),
    "sort": (lambda x: x.sort(1)[0] * 1, "sort", {1}),
    "repeat": (lambda x: x.repeat(2, 1, 1), "repeat", {0}),
    "conv": (lambda x: F.conv1d(x, torch.ones(4, S, 3)), "conv1d", {1, 2}),
    "conv with strides": (lambda x: F.conv1d(x, torch.ones(4, S, 1), stride=2), "conv1d", {1, 2}),
    "conv in groups": (lambda x: F.conv1d(x, torch.ones(S, 1, 1), groups=S), "conv1d", {1, 2}),
    "conv of one": (lambda x: F.conv1d(x, torch.ones(4, S, 1)), "conv1d", {1}),
    "table": (lambda x: x[torch.tensor([1, 0])] * 1, "index", {0}),
    "loss of labels": (
        lambda x: F.cross_entropy(x, x.long().amax(1).clamp(0, 4), reduction="none"), "cross_entropy_loss", {1},
    ),
    "reduced loss of labels": (lambda x: F.cross_entropy(x, x.long().amax(1).clamp(0, 4)), "cross_entropy_loss", {0, 1, 2}),
    "probabilities": (lambda x: F.cross_entropy(x, x, reduction="none"), "cross_entropy_loss", {1}),
    "tril": (lambda x: x.tril(), "tril", {1, 2}),
    "matmul": (lambda x: torch.ones(4, S) @ x, "matmul", {1}),
    "opaque": (lambda x: x.unfold(1, 2, 1) * 1, "unfold", {0, 1, 2}),
    "group norm": (lambda x: F.group_norm(x, 2), "group_norm", {0, 1, 2}),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 0)), "constant_pad_nd", {1}),
    "select scatter into": (lambda x: x.select_scatter(torch.ones(B, E), 1, 3), "select_scatter", set()),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_dimensions(name: str) -> None:
    """Rows of which dimensions of the first input influence each other."""
    function, operator, expected = MIXED[name]
    found = analysed(function, torch.randn(B, S, E))
    name_here = (
        operator if any(operator == str(n.target).split(".")[1] for n in found.graph.nodes if n.op == "call_function") else "pad"
    )
    typing = found.table[found.node(name_here)]
    assert {dim for x, dim in typing.mixed if x is found.inputs[0]} == expected


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_row_of_a_loss_reads_all_weights(reduction: str) -> None:
    given = (torch.randn(B, S), torch.zeros(B).long(), torch.rand(S))
    found = analysed(lambda x, t, w: F.cross_entropy(x, t, w, reduction=reduction), *given)
    node = found.node("cross_entropy_loss")
    assert (node.args[2], 0) in found.table[node].mixed


def test_only_the_shape() -> None:
    found = analysed(
        lambda x: torch.zeros_like(x) + x.new_ones(x.shape[1], 1) + x.to(torch.float64).type_as(x[0, 0, 0]), torch.randn(B, S, E)
    )
    assert found.table[found.node("zeros_like")].shape_only == (found.inputs[0],)
    assert found.table[found.node("new_ones")].shape_only == (found.inputs[0],)


def test_a_function_with_several_results() -> None:
    found = analysed(lambda x: torch.var_mean(x, -1), torch.randn(B, S, E))
    node = found.node("var_mean")
    assert len(dims_of(found.table[node])) == 2
    assert [found.letters(n) for n in found.outputs] == ["b s", "b s"]


@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 4, 4), (4, 1, 4), (2, 2, 8), (8, 2, 8)], ids=str)
def test_equal_sizes_are_not_equal_dimensions(shape: tuple[int, int, int]) -> None:
    """B == S == E, S == H, B == 1, S == 1: what is which is told by structure."""
    b, s, e = shape

    def function(x: Tensor) -> tuple[Tensor, ...]:
        heads = x.view(b, s, 2, e // 2).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2)
        return x.transpose(0, 1) * 1, x.view(b, s, 2, -1).permute(2, 0, 1, 3).flatten(1, 2), scores, x.sum(0), x.sum(1)

    found = analysed(function, torch.randn(shape))
    one, two = ("1" if b == 1 else "b"), ("1" if s == 1 else "s")
    folded = {"b s": "(b s)", "1 s": "s", "b 1": "b"}[f"{one} {two}"]
    shown = [found.letters(n) for n in found.outputs]
    assert shown == [f"{two} {one} (e0 e1)", f"e0 {folded} e1", f"{one} e0 {two} {two}", f"{two} (e0 e1)", f"{one} (e0 e1)"]


def test_adding_a_transpose_makes_two_dimensions_one() -> None:
    found = analysed(lambda x: x + x.transpose(0, 1), torch.randn(4, 4, E))
    assert found.letters(found.outputs[0], "b s e").split()[0] == found.letters(found.outputs[0]).split()[1]


def test_a_list_of_indices_is_not_element_by_element() -> None:
    """``where`` of a condition alone; its results have a size that the data decides."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = analysed(lambda x: torch.where(x > 0)[0], torch.randn(3, 3))
    listed = next(n for n in found.graph.nodes if isinstance(n.meta["val"], (list, tuple)))
    assert found.table[listed].opaque
    assert found.letters(found.inputs[0], "b s") == "b s"
