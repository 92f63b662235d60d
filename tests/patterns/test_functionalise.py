"""In-place operators become functional, or are named; the numbers and gradients stay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.patterns import zoo
from tests.patterns.zoo import Captured, assert_same, captured, targets
from varlen_inductor.patterns.functionalise import functionalise, written_storages

Tensor = torch.Tensor


class Model(nn.Module):
    """`function(h, x)`, where `h` is an intermediate value with a gradient."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x.clone()), x)


def arithmetic(h: Tensor, x: Tensor) -> Tensor:
    h += x
    h *= 2
    h.sub_(1).div_(3).clamp_(min=-0.5)
    return torch.relu_(h) + h


def dropout(h: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.dropout(h, 0.5, inplace=True) + h


def masks(h: Tensor, x: Tensor) -> Tensor:
    mask = torch.zeros_like(x).masked_fill_(x > 0, float("-inf"))
    keep = x > 1
    keep |= x < -1
    keep[:, 0] = True
    return (h + mask.nan_to_num(neginf=-5)).masked_fill_(keep, 0.0)


def slices(h: Tensor, x: Tensor) -> Tensor:
    z = torch.zeros(4, 6, 8)
    z[:, 2:4] = h[:, :2]
    z[..., ::2] = 1
    z[0] = x[0]
    z[:, -1, 3:] = float("inf")
    return z.clamp(max=9) * h


def through_views(h: Tensor, x: Tensor) -> Tensor:
    y = h * 1
    heads = y.view(4, 6, 2, 4).transpose(1, 2)
    flat = y.flatten()
    heads[:, :, 1:3] = 5
    early = flat * 2
    y.mul_(3)
    heads.permute(2, 0, 1, 3).unsqueeze(0).squeeze(0)[0].add_(1)
    return early.view_as(y) + flat.view_as(y) + heads.transpose(1, 2).reshape(4, 6, 8)


def pieces(h: Tensor, x: Tensor) -> Tensor:
    a, b = x.clone().chunk(2, -1)
    a.mul_(2)
    c, *rest = x.clone().unbind(1)
    c.zero_()
    b[:, 1] = c[:, :4]
    return torch.cat([a, b], -1) * h + c.unsqueeze(1) + rest[0].unsqueeze(1)


def boolean_index(h: Tensor, x: Tensor) -> Tensor:
    y = h * 1
    y[x[..., 0] > 0] = 0
    y[x[..., 1] > 0] = x[0, 0]
    y[x > 1] = x[0, 0, 0]
    return y


def integer_index(h: Tensor, x: Tensor) -> Tensor:
    y = h * 1
    y[torch.tensor([0, 2]), torch.tensor([1, 1])] = x[0, :2]
    return y


def copied(h: Tensor, x: Tensor) -> Tensor:
    y = torch.empty(4, 6, 8, dtype=torch.float64)
    y.copy_(h[:, :1])
    y.transpose(0, 1)[2].copy_(x[:, 0])
    return y


def several_results(h: Tensor, x: Tensor) -> Tensor:
    values, indices = (h * 1).topk(3, -1)
    values /= values.sum(-1, keepdim=True)
    values[:, 0] = 0
    return values * indices


def without_gradient_on_data(h: Tensor, x: Tensor) -> Tensor:
    z = x * 2
    with torch.no_grad():
        z.add_(1)
        z[:, 0] = 0
    return z * h


def read_in_both_grad_modes(h: Tensor, x: Tensor) -> Tensor:
    y = h * 1
    view = y[:, 1:]
    y.mul_(2)
    with torch.no_grad():
        target = view * 3
    return view * 2 - target


HANDLED = [
    arithmetic,
    dropout,
    masks,
    slices,
    through_views,
    pieces,
    boolean_index,
    integer_index,
    copied,
    several_results,
    without_gradient_on_data,
    read_in_both_grad_modes,
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", HANDLED, ids=lambda f: f.__name__)
def test_numbers_and_gradients(function: Callable[..., Tensor], dynamic: bool) -> None:
    backend = Captured(functionalise)
    assert_same(Model(function), {"x": torch.randn(4, 6, 8)}, backend, dynamic=dynamic)
    assert not written_storages(backend.graph)


# ------------------------------------------------------------------------------------------------- what is left alone


def written_without_history(h: Tensor, x: Tensor) -> Tensor:
    """The gradient of `y` does not see the multiplication."""
    y = h * 1
    with torch.no_grad():
        y.mul_(2)
    return y * 3


def written_through_detach(h: Tensor, x: Tensor) -> Tensor:
    y = h * 1
    y.detach().mul_(2)
    return y * 3


def input_written(h: Tensor, x: Tensor) -> Tensor:
    x.mul_(2)
    return h * 3 + x


def input_written_through_a_view(h: Tensor, x: Tensor) -> Tensor:
    x.transpose(0, 1)[0] = 1
    return h * 3 + x


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("function", "left"),
    [
        (written_without_history, {"mul", "mul_"}),
        (written_through_detach, {"mul", "mul_", "detach"}),
        (input_written, {"l_x_", "mul_"}),
        (input_written_through_a_view, {"l_x_", "transpose", "select", "fill_"}),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_what_stays_is_named(function: Callable[..., Tensor], left: set[str], dynamic: bool) -> None:
    backend = Captured(functionalise)
    assert_same(Model(function), {"x": torch.randn(4, 6, 8)}, backend, dynamic=dynamic)
    assert {n.name for n in written_storages(backend.graph)} == left


def test_buffers_are_written() -> None:
    norm = nn.BatchNorm1d(6)
    gm = captured(lambda x: norm(x) + 1, functionalise, x=torch.randn(4, 6, 8))
    names = {n.name.split("buffers_")[-1] for n in written_storages(gm.graph)}
    assert names == {"running_mean_", "running_var_", "num_batches_tracked_", "add_"}


def test_what_may_alias_is_written_too() -> None:
    """Whether `reshape` copies depends on strides; a prover must not count on it."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        y = x.transpose(0, 1).reshape(6, 32)
        cast = x.to(torch.float64)
        x.add_(1)
        return y.sum() + cast.sum() + w.reshape(4).sum()

    gm = captured(function, functionalise, x=torch.randn(4, 6, 8), w=torch.randn(2, 2))
    names = {n.name for n in written_storages(gm.graph)}
    assert names == {"l_x_", "transpose", "reshape", "add_"}


# A checkpoint that chooses what to save stays a higher-order operator; a plain one is recorded in its place.
OPAQUE: dict[str, Any] = {
    "use_reentrant": False,
    "context_fn": functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default]),
}


class Body(nn.Module):
    """`function(h)` under checkpoint."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        return h + checkpoint(lambda t: self.function(self.linear(t)), h, **OPAQUE)


@pytest.mark.parametrize(
    ("function", "writes"),
    [
        (lambda t: t.sin(), False),
        (lambda t: torch.nn.functional.relu(t), False),
        (lambda t: torch.nn.functional.relu(t, inplace=True), True),
        (lambda t: t.add_(1), True),
        (lambda t: torch.nn.functional.dropout(t, 0.1, True, True), True),
    ],
)
def test_higher_order_operators(function: Callable[[Tensor], Tensor], writes: bool) -> None:
    """Their bodies are looked into: one that writes makes all that goes in opaque."""
    gm = captured(Body(function), functionalise, x=torch.randn(4, 8))
    names = {n.name for n in written_storages(gm.graph)}
    assert ("mul" in names) == writes


def test_memory_that_goes_into_a_writing_body_is_left() -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            h.add_(1)
            return checkpoint(lambda t: t.mul_(3), h, **OPAQUE) + h

    backend = Captured(functionalise)
    assert_same(Writing(), {"x": torch.randn(4, 8)}, backend, backward=False)
    assert "aten.add_.Tensor" in targets(backend.graph)


def test_random_writes_stay() -> None:
    gm = captured(lambda x: torch.empty(4, 4).uniform_() + x, functionalise, x=torch.randn(4, 4))
    assert "aten.uniform_.default" in targets(gm.graph)


# ------------------------------------------------------------------------------------------------------- the docstring


def test_views_stand_any_strides() -> None:
    """Where memory is written, `view` stays: whether it shares memory matters there."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        w.view(8).mul_(2)
        return (x * 2).view(8) + w.view(8)

    gm = captured(function, functionalise, x=torch.randn(2, 4), w=torch.randn(2, 4))
    assert [t for t in targets(gm.graph) if "view" in t or "reshape" in t] == [
        "aten.view.default",
        "aten.reshape.default",
        "aten.view.default",
    ]


# ------------------------------------------------------------------------------------------ the programs behind rule 6


def test_rule_6_assignment_to_a_causal_mask() -> None:
    """A naive reader sees a causal mask; four keys are visible to all."""

    def function(h: Tensor, x: Tensor) -> Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        mask[..., :4] = True
        return torch.where(mask, h @ x.mT, 0.0)

    backend = Captured(functionalise)
    assert_same(Model(function), {"x": torch.randn(4, 6, 8)}, backend)
    (where,) = (n for n in backend.graph.nodes if str(n.target).startswith("aten.where"))
    assert str(where.args[0].target) == "aten.slice_scatter.default"


def test_rule_6_assignment_to_a_position() -> None:
    def function(h: Tensor, x: Tensor) -> Tensor:
        h[:, 0] = 7
        return h.sin()

    backend = Captured(functionalise)
    assert_same(Model(function), {"x": torch.randn(4, 6, 8)}, backend)
    (sin,) = (n for n in backend.graph.nodes if str(n.target) == "aten.sin.default")
    assert str(sin.args[0].target) == "aten.select_scatter.default"


def test_rule_6_hidden_states_zeroed_at_padding() -> None:
    def function(h: Tensor, x: Tensor) -> Tensor:
        h[~(x[..., 0] > 0)] = 0
        return h.sin()

    backend = Captured(functionalise)
    assert_same(Model(function), {"x": torch.randn(4, 6, 8)}, backend)
    (sin,) = (n for n in backend.graph.nodes if str(n.target) == "aten.sin.default")
    assert str(sin.args[0].target) == "aten.masked_fill.Scalar"


def test_rule_6_what_is_not_understood_is_opaque() -> None:
    def function(h: Tensor, x: Tensor) -> Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        torch.diagonal(mask.unfold(0, 2, 1)[:, :, 0]).fill_(False)
        return torch.where(mask, h @ x.mT, 0.0)

    backend = Captured(functionalise)
    assert_same(Model(function), {"x": torch.randn(4, 6, 8)}, backend)
    (where,) = (n for n in backend.graph.nodes if str(n.target).startswith("aten.where"))
    assert where.args[0] in written_storages(backend.graph)


class TestGraphs(expecttest.TestCase):
    def test_slice_of_new_memory(self) -> None:
        def function(x: Tensor) -> Tensor:
            mask = torch.zeros(8, 8)
            mask[:, 4:] = float("-inf")
            return x + mask

        gm = captured(function, functionalise, x=torch.randn(8, 8))
        self.assertExpectedInline(
            zoo.text(gm.graph),
            """\
%zeros = aten.zeros.default([8, 8])
%slice_1 = aten.slice.Tensor(%zeros, 1, 4, MAX)
%full_like_default = aten.full_like.default(%slice_1, -inf)
%slice_scatter_default = aten.slice_scatter.default(%zeros, %full_like_default, 1, 4, MAX, 1)
%add = aten.add.Tensor(%l_x_, %slice_scatter_default)
return [%add]""",
        )

    def test_boolean_index(self) -> None:
        def function(x: Tensor, pad: Tensor) -> Tensor:
            h = x * 2
            h[pad] = 0
            return h

        gm = captured(function, functionalise, x=torch.randn(2, 4, 8), pad=zoo.padding()[:2, :4] == 0)
        self.assertExpectedInline(
            zoo.text(gm.graph),
            """\
%mul = aten.mul.Tensor(%l_x_, 2)
%unsqueeze_default = aten.unsqueeze.default(%l_pad_, -1)
%masked_fill_scalar = aten.masked_fill.Scalar(%mul, %unsqueeze_default, 0.0)
return [%masked_fill_scalar]""",
        )
