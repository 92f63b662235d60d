"""Three gradients that go side by side into one tensor are written there by the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import varlen_inductor
from varlen_inductor import config
from varlen_inductor.backend import varlen_inductor as backend
from varlen_inductor.lowering import joined_gradients
from varlen_inductor.lowering.joined_gradients import join_gradients

ops = torch.ops.varlen_inductor
T, H, D = 12, 2, 4
OFFSETS = torch.tensor([0, 5, 5, 12], dtype=torch.int32)

Gradients = tuple[Tensor, Tensor, Tensor]


def backward_graph(place: Callable[[Gradients], Any], heads_k: int = H, dim_v: int = D) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph that does with the three gradients what ``place`` does, and random operands."""
    torch.manual_seed(0)
    shapes = (T, H, dim_v), (T, H, D), (T, heads_k, D), (T, heads_k, dim_v)
    grad, query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    out, lse, rng = ops.varlen_attn(query, key, value, OFFSETS, OFFSETS, 7, 7)

    def graph(*operands: Tensor) -> Any:
        grad, *others = operands
        return place(ops.varlen_attn_backward(grad, None, *others, others[-1], 7, 7, kernels="cpu"))

    operands = [grad, out, lse, rng, query, key, value, OFFSETS]
    return make_fx(graph, tracing_mode="fake")(*operands), operands


def check(gm: fx.GraphModule, operands: list[Tensor], joined: bool) -> None:
    wanted = gm(*operands)
    assert join_gradients(gm.graph) == joined
    gm.graph.lint()
    gm.recompile()
    targets = [node.target for node in gm.graph.nodes]
    assert (ops.varlen_attn_backward_joined.default in targets) == joined
    assert (torch.ops.aten.cat.default in targets) != joined
    torch.testing.assert_close(gm(*operands), wanted)


JOINED: dict[str, Callable[[Gradients], Any]] = {
    "stacked heads": lambda g: torch.cat(g, 1),
    "columns": lambda g: torch.cat([x.reshape(T, -1) for x in g], 1),
    "three": lambda g: torch.cat([x.unsqueeze(1) for x in g], 1),
    "a last dim of its own": lambda g: torch.cat([x.reshape(T, 1, -1) for x in g], -1),
    "one of them is read elsewhere": lambda g: (torch.cat(g, 1), g[1].sum(0), g[2].reshape(T, -1) * 2),
}
APART: dict[str, Callable[[Gradients], Any]] = {
    "another order": lambda g: torch.cat([g[1], g[0], g[2]], 1),
    "one twice": lambda g: torch.cat([g[0], g[1], g[1]], 1),
    "two": lambda g: torch.cat(g[:2], 1),
    "by rows": lambda g: torch.cat(g, 0),
    "by numbers of a head": lambda g: torch.cat(g, 2),
    "rows folded": lambda g: torch.cat([x.reshape(T // 2, -1) for x in g], 1),
    "something between": lambda g: torch.cat([g[0] * 2, g[1], g[2]], 1),
    "one of them is a result, too": lambda g: (torch.cat(g, 1), g[2]),
    "a view of one is a result, too": lambda g: (torch.cat(g, 1), g[1].reshape(T, -1)),
    "one is a result, transposed": lambda g: (torch.cat(g, 1), g[0].transpose(0, 1)),
    "one is read by its strides": lambda g: (torch.cat(g, 1), g[0].as_strided((T * H, D), (D, 1)) * 2),
    "one is read by an operator that may ask for strides": lambda g: (torch.cat(g, 1), g[0].cumsum(0)),
    "transposed between": lambda g: torch.cat([x.transpose(1, 2).reshape(T, -1) for x in g], 1),
}


@pytest.mark.parametrize("case", JOINED)
def test_is_joined(case: str) -> None:
    check(*backward_graph(JOINED[case]), joined=True)


@pytest.mark.parametrize("case", APART)
def test_stays_apart(case: str) -> None:
    check(*backward_graph(APART[case]), joined=False)


def test_shared_heads_and_another_width_of_values() -> None:
    check(*backward_graph(JOINED["columns"], heads_k=1, dim_v=8), joined=True)


def test_not_by_a_kernel_that_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    class Allocates:
        backward_into = None

    class Choice:
        backend = Allocates

    monkeypatch.setattr(joined_gradients, "choose", lambda *args, **kwargs: Choice)
    check(*backward_graph(JOINED["columns"]), joined=False)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
        return self.out(y.transpose(1, 2).flatten(-2)) * valid[..., None]


@pytest.mark.parametrize("tokens", [1, 24])
def test_gradients_do_not_share_memory(tokens: int) -> None:
    """Of one operand and of what went to it, as two leaves; a second backward adds to both."""
    offsets = torch.tensor([0, tokens], dtype=torch.int32)

    def attend(projected: Tensor, extra: Tensor) -> Tensor:
        q, k, v = (x.reshape(tokens, 2, 8) for x in projected.chunk(3, -1))
        v = v + extra
        return varlen_inductor.varlen_attn(q, k, v, offsets, offsets, tokens, tokens)

    compiled = torch.compile(attend, backend=backend, fullgraph=True)

    def step(program: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        leaves = [torch.randn(tokens, 48, requires_grad=True), torch.randn(tokens, 2, 8, requires_grad=True)]
        for _ in range(2):
            program(*leaves).square().sum().backward()
        return [x.grad for x in leaves if x.grad is not None]

    torch.testing.assert_close(step(compiled), step(attend))


def test_in_a_packed_model() -> None:
    """Through Inductor: the generated code calls the joined backward, whose gradients are eager's."""
    model = Encoder()
    x, valid = torch.randn(4, 24, 16), torch.arange(24) < torch.tensor([24, 3, 9, 1])[:, None]
    compiled = torch.compile(model, backend=backend)

    def step(program: Callable[..., Tensor]) -> list[Tensor]:
        model.zero_grad()
        out = program(x, valid)
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    with config.patch(strict=True, round_tokens=8):
        made, code = run_and_get_code(lambda: step(compiled))
    assert "direct_backward_joined_1(" in "\n".join(code)
    torch.testing.assert_close(made, step(model))
