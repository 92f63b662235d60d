"""Products of the same packed rows become one, where nobody can tell but by rounding: in forward graphs, and in packed models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch._inductor import config as inductor

from product_graphs import LONGEST, OFFSETS, E, H, T, aten, check, lines, ops, products, traced
from varlen_inductor import _compat_inductor, config
from varlen_inductor.backend import varlen_inductor as backend
from varlen_inductor.lowering import after_grad, joined_products
from varlen_inductor.lowering.joined_products import MOST_NUMBERS, join_products


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
    attends: bool = True
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
        result = self.use(*made)
        return (result, attend(x)) if self.attends else result


def attend(x: Tensor) -> Tensor:
    """An attention of rows ``x``, by which they are known to be packed."""
    heads = x[:, :8].view(-1, 1, 8)
    offsets = x.new_zeros(3, dtype=torch.int32)
    return ops.varlen_attn(heads, heads, heads, offsets, offsets, LONGEST, LONGEST, kernels="cpu")[0].sum()


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
    "no attention": replace(PLAIN, attends=False),
    "weights with more rows than are multiplied": replace(PLAIN, widths=(40, 40, 24), use=lambda q, k, v: (q * k).sum() + v.sin()),
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


def test_stays_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat_inductor, "compiles_ahead_of_time", lambda: True)
    check(traced(PLAIN, PLAIN.operands()), PLAIN.operands(), 0, 3)


def test_results_whose_strides_inductor_does_not_keep() -> None:
    """It then says of none that it is the user's."""
    three = replace(PLAIN, use=lambda q, k, v: (q, k, v), user=False)
    with inductor.patch(keep_output_stride=False):
        check(traced(three, three.operands(), user=False), three.operands(), 0, 3)


def test_other_rows() -> None:
    def other(x: Tensor, *parameters: Tensor) -> Any:
        wq, wk, wv, bq, bk, bv = parameters
        q = aten.addmm(bq, x, aten.permute(wq, [1, 0]))
        k = aten.addmm(bk, q, aten.permute(wk, [1, 0]))
        return k + aten.addmm(bv, x.sin(), aten.permute(wv, [1, 0])), attend(x)

    check(traced(other, PLAIN.operands()), PLAIN.operands(), 0, 3)


def test_something_is_multiplied_in_between() -> None:
    """What is made of rows earlier would be held longer."""

    def between(x: Tensor, *parameters: Tensor) -> Any:
        wq, wk, wv, bq, bk, bv = parameters
        q = aten.addmm(bq, x, aten.permute(wq, [1, 0]))
        k = aten.addmm(bk, q.sin(), aten.permute(wk, [1, 0]))
        return k + aten.addmm(bv, x, aten.permute(wv, [1, 0])), attend(x)

    check(traced(between, PLAIN.operands()), PLAIN.operands(), 0, 3)


def test_not_transposed_weights() -> None:
    def straight(x: Tensor, *parameters: Tensor) -> Any:
        return sum(aten.mm(x, w).sum() for w in parameters[:3]), attend(x)

    check(traced(straight, PLAIN.operands()), PLAIN.operands(), 0, 3)


@pytest.mark.skipif(not hasattr(aten.mm, "dtype"), reason="this PyTorch has no products in another dtype")
def test_products_in_another_dtype() -> None:
    def other(x: Tensor, *parameters: Tensor) -> Any:
        return sum(aten.mm.dtype(x, aten.permute(w, [1, 0]), torch.float32).sum() for w in parameters[:3]), attend(x)

    gm = traced(other, replace(PLAIN, dtype=torch.bfloat16, stored=torch.bfloat16).operands())
    before = lines(gm)
    assert join_products(gm.graph, "cpu") == 0
    assert lines(gm) == before


def test_weights_that_are_written_to() -> None:
    def writes(x: Tensor, *parameters: Tensor) -> Any:
        wq, wk, wv = parameters[:3]
        q = aten.mm(x, aten.permute(wq, [1, 0]))
        wk.copy_(wq * 2)
        k = aten.mm(x, aten.permute(wk, [1, 0]))
        v = aten.mm(x, aten.permute(wv, [1, 0]))
        return q.sum() + (k * v).sum(), attend(x)

    gm = traced(writes, PLAIN.operands())
    assert join_products(gm.graph, "cpu") == 1
    gm.recompile()
    assert products(gm) == 2  # query and value together, key
    ours, theirs = PLAIN.operands(), PLAIN.operands()
    torch.testing.assert_close(gm(*ours), writes(*theirs))
    torch.testing.assert_close(ours, theirs)


def cats(gm: fx.GraphModule) -> list[int]:
    """How many tensors each concatenation has."""
    return [len(node.args[0]) for node in gm.graph.find_nodes(op="call_function", target=aten.cat.default)]


def pairs(*layers: Callable[[list[Tensor]], list[Tensor]]) -> Callable[..., Any]:
    """Two products in each layer, with the weights that it takes, and one product between layers."""

    def graph(x: Tensor, *parameters: Tensor) -> Any:
        for layer in layers:
            made = [aten.mm(x, aten.permute(w, [1, 0])) for w in layer(list(parameters))]
            x = aten.mm(x, (made[0].sin() + made[1]).sum() * parameters[0])
        return x, attend(x)

    return graph


def test_weights_of_all_layers_are_copied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = PLAIN.operands()
    function = pairs(lambda w: w[:2], lambda w: w[1:3], lambda w: w[:2])
    gm = traced(function, operands)
    check(gm, operands, 3, 6)
    assert cats(gm) == [4]  # of two pairs, one of them used twice
    monkeypatch.setattr(joined_products, "MOST_COPIED", 4 * E * E - 1)
    gm = traced(function, operands)
    check(gm, operands, 3, 6)
    assert cats(gm) == [2, 2]


def test_weights_of_several_kinds() -> None:
    """What is next to each other and alike is copied together."""
    operands = PLAIN.operands()
    operands[3] = operands[3].repeat(1, 2)[:, : E + 8]
    operands[0] = operands[0].repeat(1, 2)[:, : E + 8]
    gm = traced(_first_columns, operands)
    assert join_products(gm.graph, "cpu") == 3
    gm.graph.lint()
    gm.recompile()
    assert cats(gm) == [2, 2, 2]
    torch.testing.assert_close(gm(*operands), _first_columns(*operands))


def _first_columns(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, *biases: Tensor) -> Any:
    """Products with weights of two widths in turns."""
    narrow = x[:, :E].sin()
    one = aten.mm(narrow, aten.permute(wq, [1, 0])) + aten.mm(narrow, aten.permute(wk, [1, 0]))
    two = aten.mm(x, aten.permute(wv, [1, 0])) + aten.mm(x, aten.permute(wv, [1, 0]))
    last = one.cos()
    three = aten.mm(last, aten.permute(wk, [1, 0])) + aten.mm(last, aten.permute(wq, [1, 0]))
    return two + three, attend(x)


def test_converted_weights_of_two_layers() -> None:
    """Those that two layers share are put side by side once."""

    def graph(x: Tensor, *parameters: Tensor) -> Any:
        wq, wk = (torch.ops.prims.convert_element_type(w, torch.float64) for w in parameters[:2])
        for _ in range(2):
            x = aten.mm(x, aten.permute(wq, [1, 0])).sin() * aten.mm(x, aten.permute(wk, [1, 0]))
        return x, attend(x)

    three = replace(PLAIN, stored=torch.float32)
    gm = traced(graph, three.operands())
    check(gm, three.operands(), 2, 2)
    assert cats(gm) == [2]


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
            x = ops.varlen_attn(q, k, v, offsets, offsets, LONGEST, LONGEST, kernels="cpu")[0].view(-1, E) + aten.mm(
                first, aten.permute(parameters[i], [1, 0])
            )
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
permute_3 = aten.permute.default(arg2_1, [1, 0])
mm = aten.mm.default(arg0_1, permute_3)
add = aten.add.Tensor(view_3, mm)
permute_4 = aten.permute.default(arg8_1, [1, 0])
permute_default_1 = aten.permute.default(slice_tensor_1, [1, 0])
addmm_default_1 = aten.addmm.default(slice_tensor_3, add, permute_default_1)
slice_tensor_7 = aten.slice.Tensor(addmm_default_1, 1, 0, 16)
slice_tensor_8 = aten.slice.Tensor(addmm_default_1, 1, 16, 32)
slice_tensor_9 = aten.slice.Tensor(addmm_default_1, 1, 32, 48)
permute_5 = aten.permute.default(arg9_1, [1, 0])
permute_6 = aten.permute.default(arg10_1, [1, 0])
view_4 = aten.view.default(slice_tensor_7, [-1, 2, 8])
view_5 = aten.view.default(slice_tensor_8, [-1, 2, 8])
view_6 = aten.view.default(slice_tensor_9, [-1, 2, 8])
varlen_attn_1 = varlen_inductor.varlen_attn.default(view_4, view_5, view_6, arg1_1, arg1_1)
getitem_3 = getitem(varlen_attn_1, 0)
view_7 = aten.view.default(getitem_3, [-1, 16])
permute_7 = aten.permute.default(arg8_1, [1, 0])
mm_1 = aten.mm.default(arg0_1, permute_7)
add_1 = aten.add.Tensor(view_7, mm_1)""",
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
    x, valid = torch.randn(4, 64, E), torch.arange(64) < torch.tensor([64, 3, 29, 1])[:, None]
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
    # In a checkpoint those of the forward are joined from 2.14 on.
    assert sum(counts) in {"no_grad": (2,), "checkpoint": (2, 4)}.get(way, (4,))
