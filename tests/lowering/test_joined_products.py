"""Products of the same packed rows become one, forward and backward, where nobody can tell but by rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from varlen_inductor import config
from varlen_inductor.backend import varlen_inductor as backend
from varlen_inductor.lowering import after_grad
from varlen_inductor.lowering.joined_products import MOST_NUMBERS, join_products

aten, ops = torch.ops.aten, torch.ops.varlen_inductor
T, E, H = 12, 16, 2
OFFSETS = torch.tensor([0, 5, 5, 12], dtype=torch.int32)


def traced(function: Callable[..., Any], operands: list[Tensor], packed: bool = True, user: bool = True) -> fx.GraphModule:
    """The graph of ``function``, the number of rows a symbol if they are packed; ``user``: its results are for the user."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(x: Tensor) -> Tensor:
        sizes = [DimDynamic.DYNAMIC if n == T and packed else DimDynamic.STATIC for n in x.shape]
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes))

    gm = make_fx(function)(*map(fake, operands))
    gm.graph.eliminate_dead_code()
    if not user:
        gm.graph.output_node().meta["user_visible_output_idxs"] = []
    return gm


def lines(gm: fx.GraphModule) -> str:
    def name(target: Any) -> str:
        return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__

    return "\n".join(f"{n.name} = {name(n.target)}{n.args[:5]}" for n in gm.graph.nodes if n.op == "call_function")


def products(gm: fx.GraphModule) -> int:
    return sum(node.target in (aten.mm.default, aten.addmm.default) for node in gm.graph.nodes)


def check(gm: fx.GraphModule, operands: list[Tensor], groups: int, left: int) -> None:
    before, wanted = lines(gm), gm(*operands)
    assert join_products(gm.graph, "cpu") == groups
    gm.graph.lint()
    gm.recompile()
    assert products(gm) == left
    if not groups:
        assert lines(gm) == before
    torch.testing.assert_close(gm(*operands), wanted)


# --- forward ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Three:
    """Three products of rows ``x``, and what is made of them."""

    widths: tuple[int, int, int] = (E, E, E)
    bias: tuple[bool, bool, bool] = (True, True, True)
    operand: int = E
    dtype: torch.dtype = torch.float64
    stored: torch.dtype = torch.float64
    use: Callable[[Tensor, Tensor, Tensor], Any] = lambda q, k, v: (q.sin() * k).sum(0) + v.cos().sum(0)
    user: bool = True
    packed: bool = True
    scale: float = 1.0

    def operands(self) -> list[Tensor]:
        torch.manual_seed(0)
        shapes = [(T, self.operand), *((n, self.operand) for n in self.widths), *((n,) for n in self.widths)]
        x, *rest = (torch.randn(shape, dtype=self.dtype) for shape in shapes)
        return [x, *(y.to(self.stored) for y in rest)]

    def __call__(self, x: Tensor, *parameters: Tensor) -> Any:
        made = []
        for w, b, biased in zip(parameters[:3], parameters[3:], self.bias, strict=True):
            weight = aten.permute(w if self.stored == self.dtype else torch.ops.prims.convert_element_type(w, self.dtype), [1, 0])
            if not biased:
                made.append(aten.mm(x, weight))
                continue
            b = b if self.stored == self.dtype else torch.ops.prims.convert_element_type(b, self.dtype)
            made.append(aten.addmm(b, x, weight, alpha=self.scale))
        return self.use(*made)


PLAIN = Three()
JOINED = {
    "alike": (PLAIN, 1, 1),
    "without biases": (replace(PLAIN, bias=(False,) * 3), 1, 1),
    "two of them with a bias": (replace(PLAIN, bias=(True, False, True)), 1, 2),
    "of different widths": (replace(PLAIN, widths=(2 * E, 2 * E, E), use=lambda q, k, v: (q * k).sum() + v.sin()), 1, 1),
    "converted, as under autocast": (replace(PLAIN, stored=torch.float32), 1, 1),
    "as wide as may be": (replace(PLAIN, operand=MOST_NUMBERS // (3 * E) // 8 * 8), 1, 1),
    "all are kept": (replace(PLAIN, use=lambda q, k, v: (q, k.view(-1, H, E // H), v), user=False), 1, 1),
    "one is kept": (replace(PLAIN, use=lambda q, k, v: (q.sin(), k.sin(), v), user=False), 1, 2),
    "in views": (replace(PLAIN, use=lambda q, k, v: q.view(-1, H, 8).mT + k.view(-1, H, 8).mT * v.sum()), 1, 1),
    "one is not used": (replace(PLAIN, use=lambda q, k, v: q * k), 1, 1),
}
APART = {
    "too wide": replace(PLAIN, operand=MOST_NUMBERS // (3 * E) // 8 * 8 + 8),
    "not aligned": replace(PLAIN, widths=(E + 1, E + 1, E + 1)),
    "rows of a known number": replace(PLAIN, packed=False),
    "scaled": replace(PLAIN, scale=2.0),
    "for the user": replace(PLAIN, use=lambda q, k, v: (q, k, v)),
    "views for the user": replace(PLAIN, use=lambda q, k, v: (q.view(-1, H, 8), k.t(), v[1:])),
    "read by their strides": replace(
        PLAIN, use=lambda q, k, v: q.as_strided((4,), (1,)) + k.cumsum(0)[0, :4] + v.sort().values[0, :4]
    ),
}


@pytest.mark.parametrize("case", JOINED)
def test_is_joined(case: str) -> None:
    three, groups, left = JOINED[case]
    gm = traced(three, three.operands(), three.packed, three.user)
    check(gm, three.operands(), groups, left)


@pytest.mark.parametrize("case", APART)
def test_stays_apart(case: str) -> None:
    three = APART[case]
    check(traced(three, three.operands(), three.packed, three.user), three.operands(), 0, 3)


def test_stays_on_another_device() -> None:
    assert join_products(traced(PLAIN, PLAIN.operands()).graph) == 0


def test_other_rows() -> None:
    def other(x: Tensor, *parameters: Tensor) -> Any:
        wq, wk, wv, bq, bk, bv = parameters
        q = aten.addmm(bq, x, aten.permute(wq, [1, 0]))
        k = aten.addmm(bk, q, aten.permute(wk, [1, 0]))
        return k + aten.addmm(bv, x.sin(), aten.permute(wv, [1, 0]))

    check(traced(other, PLAIN.operands()), PLAIN.operands(), 0, 3)


def test_weights_that_are_written_to() -> None:
    def writes(x: Tensor, *parameters: Tensor) -> Any:
        out = PLAIN(x, *parameters)
        parameters[1].copy_(parameters[0] * 2)
        return out

    gm = traced(writes, PLAIN.operands())
    assert join_products(gm.graph, "cpu") == 1  # query and value
    gm.recompile()
    ours, theirs = PLAIN.operands(), PLAIN.operands()
    torch.testing.assert_close(gm(*ours), writes(*theirs))
    torch.testing.assert_close(ours, theirs)


def test_weights_are_not_results_of_other_operators() -> None:
    def made(x: Tensor, *parameters: Tensor) -> Any:
        return PLAIN(x, *(y * 2 for y in parameters))

    check(traced(made, PLAIN.operands()), PLAIN.operands(), 0, 3)


def test_layers() -> None:
    """The weights of all layers are put side by side at once; what is between attentions is not joined with what is behind."""

    def layers(x: Tensor, offsets: Tensor, *parameters: Tensor) -> Tensor:
        first = x
        for i in (0, 6):
            q, k, v = (aten.addmm(b, x, aten.permute(w, [1, 0])) for w, b in zip(parameters[i : i + 3], parameters[i + 3 : i + 6]))
            q, k, v = (y.view(-1, H, E // H) for y in (q, k, v))
            x = ops.varlen_attn(q, k, v, offsets, offsets, 7, 7, kernels="cpu")[0].view(-1, E) + aten.mm(first, parameters[i])
        return x

    operands = [PLAIN.operands()[0], OFFSETS, *(y.clone() for _ in range(2) for y in PLAIN.operands()[1:])]
    gm = traced(layers, operands)
    check(gm, operands, 2, 4)
    assert_expected_inline(
        lines(gm),
        """\
permute = aten.permute.default(arg2_1, [1, 0])
cat_default = aten.cat.default([arg2_1, arg3_1, arg4_1, arg8_1, arg9_1, arg10_1],)
slice_tensor = aten.slice.Tensor(cat_default, 0, 0, 48)
slice_tensor_1 = aten.slice.Tensor(cat_default, 0, 48, 96)
cat_default_1 = aten.cat.default([arg5_1, arg6_1, arg7_1, arg11_1, arg12_1, arg13_1],)
slice_tensor_2 = aten.slice.Tensor(cat_default_1, 0, 0, 48)
slice_tensor_3 = aten.slice.Tensor(cat_default_1, 0, 48, 96)
permute_default = aten.permute.default(slice_tensor, [1, 0])
addmm_default = aten.addmm.default(slice_tensor_2, arg0_1, permute_default)
slice_tensor_4 = aten.slice.Tensor(addmm_default, 1, 0, 16)
slice_tensor_5 = aten.slice.Tensor(addmm_default, 1, 16, 32)
slice_tensor_6 = aten.slice.Tensor(addmm_default, 1, 32, 48)
permute_1 = aten.permute.default(arg3_1, [1, 0])
permute_2 = aten.permute.default(arg4_1, [1, 0])
view = aten.view.default(slice_tensor_4, [-1, 2, 8])
view_1 = aten.view.default(slice_tensor_5, [-1, 2, 8])
view_2 = aten.view.default(slice_tensor_6, [-1, 2, 8])
varlen_attn = varlen_inductor.varlen_attn.default(view, view_1, view_2, arg1_1, arg1_1)
getitem = getitem(varlen_attn, 0)
view_3 = aten.view.default(getitem, [-1, 16])
mm = aten.mm.default(arg0_1, arg2_1)
add = aten.add.Tensor(view_3, mm)
permute_3 = aten.permute.default(arg8_1, [1, 0])
permute_default_1 = aten.permute.default(slice_tensor_1, [1, 0])
addmm_default_1 = aten.addmm.default(slice_tensor_3, add, permute_default_1)
slice_tensor_7 = aten.slice.Tensor(addmm_default_1, 1, 0, 16)
slice_tensor_8 = aten.slice.Tensor(addmm_default_1, 1, 16, 32)
slice_tensor_9 = aten.slice.Tensor(addmm_default_1, 1, 32, 48)
permute_4 = aten.permute.default(arg9_1, [1, 0])
permute_5 = aten.permute.default(arg10_1, [1, 0])
view_4 = aten.view.default(slice_tensor_7, [-1, 2, 8])
view_5 = aten.view.default(slice_tensor_8, [-1, 2, 8])
view_6 = aten.view.default(slice_tensor_9, [-1, 2, 8])
varlen_attn_1 = varlen_inductor.varlen_attn.default(view_4, view_5, view_6, arg1_1, arg1_1)
getitem_3 = getitem(varlen_attn_1, 0)
view_7 = aten.view.default(getitem_3, [-1, 16])
mm_1 = aten.mm.default(arg0_1, arg8_1)
add_1 = aten.add.Tensor(view_7, mm_1)""",
    )


# --- backward -----------------------------------------------------------------------------------------------------------------


Gradients = tuple[Tensor, Tensor, Tensor]


def backward(place: Callable[..., Any], heads_k: int = H) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph of what ``place`` makes of three gradients, of a matrix to add to, of rows and of three weights."""
    torch.manual_seed(0)
    width = E // H
    shapes = (T, H, width), (T, H, width), (T, heads_k, width), (T, heads_k, width)
    grad, query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    out, lse, rng = ops.varlen_attn(query, key, value, OFFSETS, OFFSETS, 7, 7)
    residual, rows = torch.randn(T, E, dtype=torch.float64), torch.randn(T, E, dtype=torch.float64)
    weights = [torch.randn(n * width, E, dtype=torch.float64) for n in (H, heads_k, heads_k)]

    def graph(grad: Tensor, residual: Tensor, rows: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, *others: Tensor) -> Any:
        gradients = ops.varlen_attn_backward(grad, None, *others, others[-1], 7, 7, kernels="cpu")
        return place([x.reshape(rows.shape[0], -1) for x in gradients], residual, rows, [wq, wk, wv])

    operands = [grad, residual, rows, *weights, out, lse, rng, query, key, value, OFFSETS]
    return traced(graph, operands), operands


def of_rows(gradients: Gradients, residual: Tensor | None, weights: list[Tensor], order: tuple[int, ...] = (2, 1, 0)) -> Tensor:
    for i in order:
        weight = aten.permute(aten.permute(weights[i], [1, 0]), [1, 0])
        residual = aten.mm(gradients[i], weight) if residual is None else aten.addmm(residual, gradients[i], weight)
    assert residual is not None
    return residual


def of_weights(gradients: Gradients, rows: Tensor) -> list[Tensor]:
    return [aten.mm(aten.permute(g, [1, 0]), rows) for g in gradients]


def of_biases(gradients: Gradients) -> list[Tensor]:
    return [g.sum([0], keepdim=True).view(-1) for g in gradients]


SIDE_BY_SIDE: dict[str, tuple[Callable[..., Any], int]] = {
    "all": (lambda g, r, x, w: (of_rows(g, r, w), of_weights(g, x), of_biases(g)), 2),
    "no residual": (lambda g, r, x, w: (of_rows(g, None, w), of_weights(g, x), of_biases(g)), 2),
    "another order": (lambda g, r, x, w: (of_rows(g, r, w, (1, 0, 2)), of_weights(g, x)), 2),
    "frozen": (lambda g, r, x, w: of_rows(g, r, w), 1),
    "one frozen": (lambda g, r, x, w: (of_rows(g, r, w), of_weights(g, x)[:2], of_biases(g)), 3),
    "other rows for the weights": (lambda g, r, x, w: (of_rows(g, r, w), of_weights(g, x)[:2], of_weights(g, x.sin())[2]), 4),
    "sums in different forms": (lambda g, r, x, w: (of_rows(g, r, w), of_biases(g)[0], g[1].sum(0), g[2].sum(0)), 1),
    "the gradients are read elsewhere": (lambda g, r, x, w: (of_rows(g, r, w), (g[0] * 2).sum(1), of_weights(g, x)), 2),
}
LEFT: dict[str, tuple[Callable[..., Any], int]] = {
    "one sum is used in between": (lambda g, r, x, w: (of_rows(g, s := of_rows(g[:1] + g[:2], r, w, (0,)), w, (1, 2)), s), 3),
    "one is not multiplied": (lambda g, r, x, w: (of_rows(g, r, w, (1, 0)), g[2].sum(0)), 2),
    "added otherwise": (lambda g, r, x, w: of_rows(g, r, w, (0,)) + of_rows(g, None, w, (1, 2)), 3),
    "a gradient is a result": (lambda g, r, x, w: (of_rows(g, r, w), g[1]), 3),
    "a gradient is multiplied twice": (lambda g, r, x, w: (of_rows(g, r, w), aten.mm(g[1], w[0])), 4),
    "weights only": (lambda g, r, x, w: of_weights(g, x), 3),
}


@pytest.mark.parametrize("case", SIDE_BY_SIDE)
def test_gradients_side_by_side(case: str) -> None:
    place, left = SIDE_BY_SIDE[case]
    check(*backward(place), 1, left)


@pytest.mark.parametrize("case", LEFT)
def test_gradients_stay_apart(case: str) -> None:
    place, left = LEFT[case]
    check(*backward(place), 0, left)


def test_shared_heads() -> None:
    check(*backward(SIDE_BY_SIDE["all"][0], heads_k=1), 1, 2)


def test_backward_graph() -> None:
    gm, operands = backward(SIDE_BY_SIDE["all"][0])
    check(gm, operands, 1, 2)
    gm.graph.eliminate_dead_code()
    assert_expected_inline(
        lines(gm),
        """\
varlen_attn_backward_joined_default = varlen_inductor.varlen_attn_backward_joined.default(arg0_1, None, arg6_1, arg7_1, arg8_1)
cat_default = aten.cat.default([arg3_1, arg4_1, arg5_1],)
slice_tensor = aten.slice.Tensor(cat_default, 0, 0, 48)
addmm_default = aten.addmm.default(arg1_1, varlen_attn_backward_joined_default, slice_tensor)
permute_default = aten.permute.default(varlen_attn_backward_joined_default, [1, 0])
mm_default = aten.mm.default(permute_default, arg2_1)
slice_tensor_4 = aten.slice.Tensor(mm_default, 0, 0, 16)
slice_tensor_5 = aten.slice.Tensor(mm_default, 0, 16, 32)
slice_tensor_6 = aten.slice.Tensor(mm_default, 0, 32, 48)
sum_dim_int_list = aten.sum.dim_IntList(varlen_attn_backward_joined_default, [0], True)
slice_tensor_7 = aten.slice.Tensor(sum_dim_int_list, 1, 0, 16)
slice_tensor_8 = aten.slice.Tensor(sum_dim_int_list, 1, 16, 32)
slice_tensor_9 = aten.slice.Tensor(sum_dim_int_list, 1, 32, 48)
view_3 = aten.view.default(slice_tensor_7, [-1])
view_4 = aten.view.default(slice_tensor_8, [-1])
view_5 = aten.view.default(slice_tensor_9, [-1])""",
    )


# --- through Inductor -----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (H, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
        return x + self.out(y.transpose(1, 2).flatten(-2))


class Model(nn.Module):
    """Layers without gradients, in autocast, with shared weights: what is easy to get wrong before autograd."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        if way == "tied":
            self.layers[1] = self.layers[0]
        if way == "frozen":
            self.layers[0].k.requires_grad_(False)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not (self.way == "no_grad" and i == 0)):
                if self.way == "checkpoint":
                    x = torch.utils.checkpoint.checkpoint(layer, x, valid, use_reentrant=False)
                else:
                    x = layer(x, valid)
        return x * valid[..., None]


@pytest.mark.parametrize("way", ["plain", "tied", "frozen", "no_grad", "checkpoint", "autocast"])
def test_in_a_packed_model(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(graph: fx.Graph) -> int:
        counts.append(join_products(graph, "cpu"))
        return counts[-1]

    monkeypatch.setattr(after_grad, "PASSES", tuple(counted if each is join_products else each for each in after_grad.PASSES))
    torch.manual_seed(0)
    model = Model(way)
    x, valid = torch.randn(4, 24, E), torch.arange(24) < torch.tensor([24, 3, 9, 1])[:, None]
    compiled = torch.compile(model, backend=backend)

    def step(program: Callable[..., Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            out = program(leaf, valid)
        out.square().sum().backward()
        found = {"out": out.detach(), "x": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}}
        return {name: value for name, value in found.items() if value is not None}

    # A graph from Inductor's cache would be counted by nobody.
    with config.patch(strict=True, round_tokens=8), inductor.patch(force_disable_caches=True):
        made, wanted = step(compiled), step(model)
    assert made.keys() == wanted.keys()
    loose = {"rtol": 5e-2, "atol": 5e-2} if way == "autocast" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(made, wanted, **loose)
    assert sum(counts) == {"plain": 4, "tied": 4, "frozen": 4, "no_grad": 2, "checkpoint": 2, "autocast": 4}[way]
